"""memory_format=channels_last: the same network and numbers, in the other order, whatever a run does to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import mask
from PIL import Image
from torch import nn

import morphtrain
from morphtrain import schema
from morphtrain.cost.step import blank_batch
from morphtrain.data import digits, image_folder, synthetic
from morphtrain.errors import UserError
from morphtrain.grow import widen
from morphtrain.model import ResNet
from morphtrain.morph import ChannelGraph, Gate, describe, format_of_model, rebuild
from morphtrain.morph.formats import format_of
from morphtrain.prune.reconfigure import reconfigure
from morphtrain.state import Run
from morphtrain.trainer import checkpoint
from morphtrain.trainer.build import build_run, in_format
from morphtrain.trainer.epoch import start
from morphtrain.trainer.loop import evaluate, train_epoch
from morphtrain.trainer.train import train

LAST, FIRST = torch.channels_last, torch.contiguous_format
CHANNELS_LAST = "memory_format=channels_last"


UNPRUNED = [override for override in SMALL if not override.startswith("prune")]


def config_of(*overrides: str) -> schema.Config:
    return morphtrain.compose("tracking=none", "device=cpu", *overrides)


def formats(model: nn.Module, x: torch.Tensor) -> set[torch.memory_format]:
    """The formats of all inputs and outputs of layers and blocks in training, and of the kernels.

    Except for views, and where the format does not matter: a single pixel, and the two that stand for an empty branch.
    """
    found = {format_of(p) for p in model.parameters() if p.dim() == 4}

    def note(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        images = [t for t in (*inputs, output) if t.dim() == 4 and t.shape[2:].numel() > 2 and t.shape[1] > 0]
        found.update(format_of(t) for t in images if t.is_contiguous() or t.is_contiguous(memory_format=LAST))

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    model.train()(x)
    for hook in hooks:
        hook.remove()
    return found


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shape=st.lists(st.integers(1, 4), min_size=4, max_size=5))
def test_the_format_is_read_off_the_strides(shape: list[int]) -> None:
    last = LAST if len(shape) == 4 else torch.channels_last_3d
    ambiguous = torch.Size(shape[1:]).numel() == 1
    assert format_of(torch.empty(shape, memory_format=last)) is (FIRST if ambiguous else last)
    if max(shape[2:]) > 1 or not ambiguous:
        assert format_of(torch.empty(shape)) is FIRST


def pictures(root: Path) -> Path:
    for part in ("train", "val"):
        for number in range(6):
            path = root / part / f"class_{number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(number).integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(path)
    return root


@pytest.mark.parametrize("kind", ["digits", "colours", "files", "bytes"])
def test_batches_are_in_the_format_and_otherwise_the_same(kind: str, tmp_path: Path) -> None:
    if kind == "digits":
        data = digits.build(schema.data.Digits("digits", 8, 1, 0.5))
    elif kind == "colours":
        data = synthetic.build(schema.data.Synthetic("synthetic", 20, 8, 8, 3, 4, 1.0))
        data.shift, data.flip = 1, True
    else:
        folder = schema.data.ImageFolder(
            "image_folder", str(pictures(tmp_path)), 16, 18, 0.1, True, kind == "bytes", "auto", 0
        )
        data = image_folder.build(folder)
    here = torch.device("cpu")
    ordinary, last = data.to(here), data.to(here, LAST)
    for _ in range(2):  # a second epoch finds what the first one prepared
        epochs = [list(d.train_batches(4, torch.Generator().manual_seed(3))) for d in (ordinary, last)]
        epochs = [batches + list(d.val_batches()) for batches, d in zip(epochs, (ordinary, last), strict=True)]
        for (a, labels), (b, same) in zip(*epochs, strict=True):
            assert format_of(a) is FIRST and format_of(b) is LAST
            assert torch.equal(a, b) and torch.equal(labels, same)
            assert {format_of(part) for part in b.tensor_split(2)} == {LAST}


def kill_channels(run: Run) -> None:
    """Kill a third of every space, and all inside the last block."""
    inside = run.graph.blocks[-1].spaces[0]
    for space in run.graph.spaces:
        mask(space, torch.arange(space.size if space is inside else space.size // 3))


@pytest.mark.parametrize("model", ["model.shortcut=A", "model.shortcut=B", "model=mobilenet_v2"])
def test_it_survives_reconfiguration_growth_and_loading(model: str, tmp_path: Path) -> None:
    own = [o for o in SMALL if o.startswith("model.")] if model.startswith("model.") else []
    run = build_run(config_of(*(o for o in SMALL if not o.startswith("model.")), *own, model, CHANNELS_LAST))
    x = next(iter(run.data.train_batches(8, torch.Generator())))[0]
    assert formats(run.model, x) == {LAST}
    kill_channels(run)
    assert reconfigure(run.graph, optimizer=run.optimizer).removed_blocks
    assert formats(run.model, x) == {LAST}
    widen(run.graph, factor=1.5, optimizer=run.optimizer)
    run.graph.insert_block(run.graph.stage_ends[0].path, optimizer=run.optimizer)
    run.graph.insert_layer(run.graph.layer_places[0], [x], optimizer=run.optimizer)
    assert formats(run.model, x) == {LAST}
    checkpoint.save(run, tmp_path, None)
    loaded = morphtrain.load(tmp_path / "last.pt")
    assert torch.equal(loaded(x), run.model.eval()(x))
    assert formats(loaded, x) == {LAST}


def test_gated_and_emptied_layers_keep_the_format_of_what_passes() -> None:
    x = torch.randn(4, 3, 8, 8)
    model = ResNet(blocks=2, width=4)
    gates = {
        "stages.0.1.branch.0": Gate(reads=torch.tensor([0, 2])),
        "stages.0.1.branch.3": Gate(writes=torch.tensor([1, 3])),
    }
    ChannelGraph.trace(model, x[:1]).gate(gates)
    ordinary = model.train()(x)
    in_format(model, "channels_last")
    assert formats(model, x.to(memory_format=LAST)) == {LAST}
    torch.testing.assert_close(model.train()(x.to(memory_format=LAST)), ordinary, rtol=1e-4, atol=1e-5)


def test_a_rebuilt_network_has_the_strides_of_the_one_that_was_cut() -> None:
    """Kernels of one pixel too: which order of sums a convolution takes may depend on them."""
    model = in_format(ResNet(blocks=1, width=4, layers=3, bottleneck=True), "channels_last")
    graph = ChannelGraph.trace(model, torch.zeros(1, 3, 8, 8))
    for space in graph.spaces:
        graph.reindex(space, range(space.size - 1))
    strides = {name: p.stride() for name, p in model.named_parameters()}
    for late in (False, True):  # made channels_last after rebuilding, or before it
        fresh = ResNet(blocks=1, width=4, layers=3, bottleneck=True)
        twin = rebuild(fresh if late else in_format(fresh, "channels_last"), describe(model))
        twin = in_format(twin, "channels_last") if late else twin
        assert {name: p.stride() for name, p in twin.named_parameters()} == strides
    assert any(p.shape[2:] == (1, 1) for p in model.parameters() if p.dim() == 4)


def test_it_trains_to_the_same_numbers_up_to_rounding() -> None:
    runs = [build_run(config_of(*UNPRUNED, *more)) for more in ([], [CHANNELS_LAST])]
    losses = []
    for run in runs:
        run.epoch = 1
        start(run)
        train_epoch(run)
        losses.append((run.train_loss, *evaluate(run)))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert [format_of_model(run.model) for run in runs] == [FIRST, LAST]


def test_resumed_it_ends_at_the_same_bits(tmp_path: Path) -> None:
    """Pruned on both sides of the interruption; momentum comes back in the format of its weights."""
    ends = []
    for name, epochs in (("whole", ["6"]), ("parts", ["4", "6"])):
        directory = tmp_path / name
        directory.mkdir()
        for number, last in enumerate(epochs):
            wanted = config_of(*SMALL, CHANNELS_LAST, "epochs=6", f"resume={'auto' if number else 'never'}")
            stop_after(int(last), wanted, directory)
        ends.append(torch.load(directory / "last.pt", weights_only=True))
    whole, parts = ends
    assert whole["model"].keys() == parts["model"].keys()
    for key, value in whole["model"].items():
        assert torch.equal(value, parts["model"][key]), key


def stop_after(epoch: int, config: schema.Config, directory: Path) -> None:
    """Train, and be interrupted after an epoch."""

    class Interrupted(Exception):
        pass

    original = checkpoint.save

    def save(run: Run, *args: object) -> None:
        original(run, *args)  # type: ignore[arg-type]
        if run.epoch == epoch < config.epochs:
            raise Interrupted

    checkpoint.save = save  # type: ignore[assignment]
    try:
        train(config, directory, {})
    except Interrupted:
        pass
    finally:
        checkpoint.save = original  # type: ignore[assignment]


def test_memory_and_speed_are_of_batches_in_the_format() -> None:
    model = ResNet(blocks=1, width=4)
    for name, wanted in (("channels_last", LAST), ("contiguous", FIRST)):
        images, _ = blank_batch(in_format(model, name), (3, 8, 8), 4)
        assert format_of(images) is wanted


def test_a_wrong_format_is_named() -> None:
    with pytest.raises(UserError, match="memory_format=nhwc: must be one of contiguous, channels_last, auto"):
        config_of("memory_format=nhwc")
