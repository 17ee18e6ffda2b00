"""Number formats in whole runs: they train, morph, resume, are exported, and say what they cost."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from number_formats import BRAIN, FORMATS, HALF, begun, config_of
from test_memory_format import stop_after
from test_resume import assert_same, contents
from torch import nn
from torch.optim import SGD, Optimizer
from whole_runs import trained_to_the_end

import morphtrain
from morphtrain import compilation, schema
from morphtrain.cost import estimate_memory, memory_model
from morphtrain.cost.layer_steps import LayerSteps
from morphtrain.cost.step import casts_of, training_step
from morphtrain.errors import UserError
from morphtrain.export.write import export
from morphtrain.model import ResNet
from morphtrain.morph import ChannelGraph, input_type
from morphtrain.precision import Precision, autocast
from morphtrain.precision import auto as precisions
from morphtrain.precision.bf16_pure import Stochastic
from morphtrain.precision.casting import Casting
from morphtrain.precision.o3 import Short
from morphtrain.trainer import auto, checkpoint, stored_network
from morphtrain.trainer.build import build_run
from morphtrain.trainer.loop import train_epoch
from morphtrain.trainer.max_batch_report import show_max_batch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fast_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a format takes here is timed whenever one is built, which is no matter of these tests."""
    monkeypatch.setattr(autocast, "slowdown", lambda device, dtype: 1.0)


OF_LOSS = ("prune.lasso_ratio=0.9", "prune.lasso_ratio_of=loss", "prune.interval=1", "prune.start_epoch=1")
PRUNES = {
    "none": ("prune=none",),
    "prunetrain": ("prune=prunetrain", *OF_LOSS, "prune.threshold=0.5"),
    "subgradient": ("prune=prunetrain", *OF_LOSS, "prune.threshold=0.5", "prune.update=subgradient"),
    "morphnet": ("prune=morphnet", "prune.lasso_ratio=0.5", *OF_LOSS[1:], "prune.gamma_threshold=0.7"),
    "early": ("prune=early", "prune.target=0.6", "prune.by=0.7", "prune.cuts=1", "prune.round_to=1"),
}
GROWS = {
    "none": ("grow=none",),
    "wider": ("grow=wider", "grow.at_epochs=[2]", "grow.factor=1.5", "grow.new_lr_factor=0.5"),
    "deeper": ("grow=deeper", "grow.at_epochs=[2]", "grow.start=half_half"),
    "layer": ("grow=deeper", "grow.at_epochs=[2]", "grow.operator=layer"),
}
# prunetrain leaves no blocks here, so that there is no place for a layer.
ALL = [case for case in itertools.product(FORMATS, PRUNES, GROWS) if case[1:] != ("prunetrain", "layer")]
QUICK = [
    ("o2 float16", "prunetrain", "wider"),
    ("o3 norms", "morphnet", "deeper"),
    ("stochastic", "prunetrain", "wider"),
]


@pytest.mark.parametrize(
    ("name", "prune", "grow"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in ALL],
    ids=map("-".join, ALL),
)
def test_a_run_morphs_and_resumes_to_the_same_bits(name: str, prune: str, grow: str, tmp_path: Path) -> None:
    options = (*FORMATS[name], *PRUNES[prune], *GROWS[grow])
    for place, stops in (("whole", [3]), ("parts", [2, 3])):
        (tmp_path / place).mkdir()
        for number, last in enumerate(stops):
            stop_after(last, config_of(*options, f"resume={'auto' if number else 'never'}"), tmp_path / place)
    whole, parts = (contents(tmp_path / place / "last.pt") for place in ("whole", "parts"))
    assert_same(parts, whole)
    assert all(math.isfinite(record["train_loss"]) for record in whole["facts"]["history"])
    if grow != "none" or prune not in ("none", "morphnet"):
        assert len(whole["facts"]["changes"]) > 1
    layers = {t.dtype for key, t in whole["model"].items() if key.endswith("weight") and t.dim() > 1}
    half = BRAIN if name in ("o3", "stochastic") else HALF if name.startswith("o3") else torch.float32
    assert layers == {half}
    norms = {t.dtype for key, t in whole["model"].items() if "running" in key}
    assert norms == {half if name in ("o3", "o3 float16") else torch.float32}
    loaded = morphtrain.load(tmp_path / "parts" / "last.pt")
    assert {key: t.dtype for key, t in loaded.state_dict().items()} == {k: t.dtype for k, t in whole["model"].items()}
    assert loaded(torch.zeros(2, 3, 8, 8, dtype=input_type(loaded))).isfinite().all()


@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("lars", marks=pytest.mark.slow), "adamw"])
def test_momentum_of_32_bits_survives_a_checkpoint(optimizer: str, tmp_path: Path) -> None:
    """torch casts what it loads to the type of the parameters."""
    config = config_of(*FORMATS["stochastic"], f"optimizer={optimizer}", "epochs=2")
    stop_after(1, config, tmp_path)
    run = checkpoint.Checkpoint(tmp_path / "last.pt").restore(config)
    assert run.model.classifier.weight.dtype is BRAIN
    saved = torch.load(tmp_path / "last.pt", weights_only=True)["optimizer"]
    assert_same(run.optimizer.state_dict()["state"], saved["state"])
    moments = [t for state in run.optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.dim()]
    assert moments and all(moment.dtype is torch.float32 for moment in moments)


def test_another_type_than_the_files_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(*FORMATS["o3"], "epochs=2")
    stop_after(1, config, tmp_path)
    monkeypatch.setattr("morphtrain.precision.o3.chosen_type", lambda name, device: HALF)  # as on a GPU
    with pytest.raises(UserError, match="is bfloat16, and precision=o3 on cpu makes it float16; go on on such a"):
        checkpoint.Checkpoint(tmp_path / "last.pt").restore(config)


@pytest.mark.parametrize("kind", [pytest.param("onnx", marks=pytest.mark.slow), "torch_export", "state_dict"])
def test_a_network_of_sixteen_bits_is_exported_in_32(kind: str, tmp_path: Path) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
    stop_after(1, config_of(*FORMATS["o3"], "epochs=1"), tmp_path)
    path = tmp_path / "last.pt"
    network = morphtrain.load(path)
    written = export(network, tmp_path / "net", kind, morphtrain.load_preprocessing(path))
    assert written.difference < 1e-4
    assert input_type(network) is BRAIN
    if kind == "state_dict":
        values = torch.load(written.files[0], weights_only=True)
        assert_same(values, {key: t.float() if t.is_floating_point() else t for key, t in network.state_dict().items()})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["o1", "o2", "o2 float16", "bf16_pure", "stochastic"])
def test_the_accuracy_of_a_format_is_that_of_32_bits(name: str) -> None:
    """On the digits, by six pairs: with 95 % confidence less than two points are lost."""

    def accuracy(seed: int, *options: str) -> float:
        small = ("model.width=8", "epochs=6", "tracking=none", "device=cpu", f"seed={seed}")
        return trained_to_the_end(morphtrain.compose(*small, *options)).history[-1]["val_accuracy"]

    gains = torch.tensor([accuracy(seed, *FORMATS[name]) - accuracy(seed) for seed in range(1, 7)])
    t = 2.015  # the 95 % quantile for five degrees of freedom
    assert gains.mean() - t * gains.std() / 6**0.5 > -0.02


@pytest.mark.parametrize("name", ["o2", "stochastic"])
def test_compiled_steps_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[torch.fx.GraphModule] = []
    monkeypatch.setattr(compilation, "BACKEND", lambda graph, inputs: graphs.append(graph) or graph.forward)
    plain, code = (begun(*FORMATS[name], *more) for more in ((), ("compile=default",)))
    for run in (plain, code):
        torch.manual_seed(0)
        train_epoch(run)
    assert len(graphs) == 1, "one graph, and the same one in each step"
    assert code.train_loss == plain.train_loss
    assert_same(code.model.state_dict(), plain.model.state_dict())


def test_older_checkpoints_go_on(tmp_path: Path) -> None:
    """A run of before has neither of the new metrics in its history, and the same keys."""
    config = config_of(*FORMATS["o1 float16"], "epochs=2")
    stop_after(1, config, tmp_path)
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    facts = json.loads(content["facts"])
    for metric in ("loss_scale", "skipped_steps", "underflow_share"):
        del facts["history"][0][metric]
    written = {**content, "facts": json.dumps(facts), "format": stored_network.WITHOUT_DIGEST}
    torch.save(written, tmp_path / "last.pt")
    run = checkpoint.Checkpoint(tmp_path / "last.pt").restore(config)
    assert run.precision.state_dict()["scale"] == content["precision"]["scale"]


def prepared(name: str) -> tuple[nn.Module, Optimizer, Any]:
    """A network, its optimizer and how the format computes."""
    model = ResNet(blocks=1, width=8)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    kinds: dict[str, Precision] = {
        "o0": Precision(CPU),
        "o2": Casting(CPU, BRAIN),
        "o3": Short(CPU, BRAIN, keep_batchnorm_fp32=False),
        "stochastic": Stochastic(CPU),
    }
    kinds[name].prepare(model, optimizer)
    return model, optimizer, casts_of(kinds[name])


def test_memory_is_that_of_the_format() -> None:
    """Activations of half the size in all; parameters, gradients and momentum of half the size in o3 only."""
    found = {}
    for name in ("o0", "o2", "o3", "stochastic"):
        model, optimizer, casts = prepared(name)
        before = {key: (tensor.dtype, tensor.data_ptr()) for key, tensor in model.state_dict().items()}
        found[name] = memory_model(model, (3, 16, 16), optimizer=optimizer, precision=casts, device_type="cuda")
        assert {key: (tensor.dtype, tensor.data_ptr()) for key, tensor in model.state_dict().items()} == before
        peak = estimate_memory(model, (3, 16, 16), 8, optimizer=optimizer, precision=casts, device_type="cuda")
        assert peak == found[name].peak(8)
    for name in ("o2", "o3", "stochastic"):
        assert 0.45 < found[name].per_sample / found["o0"].per_sample < 0.65
    assert 0.45 < found["o3"].fixed / found["o0"].fixed < 0.6
    assert found["o3"].fixed < found["stochastic"].fixed < found["o2"].fixed


@pytest.mark.parametrize("name", ["o2", "o3", "stochastic"])
def test_a_step_of_a_copy_is_one_of_the_format(name: str) -> None:
    torch.manual_seed(0)
    model, optimizer, casts = prepared(name)
    types = [parameter.dtype for parameter in model.parameters()]
    images = torch.randn(4, 3, 8, 8).to(input_type(model))
    before = copy.deepcopy(model.state_dict())
    seen: set[torch.dtype] = set()
    model.stem.register_forward_hook(lambda module, x, y: seen.add(y.dtype))
    training_step(model, optimizer, images, torch.tensor([0, 1, 2, 3]), casts)
    assert seen == {BRAIN}
    assert [parameter.dtype for parameter in model.parameters()] == types
    assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    again = pickle.loads(pickle.dumps(casts))  # as for a process that verifies a batch
    training_step(model, optimizer, images, torch.tensor([0, 1, 2, 3]), again)


@pytest.mark.parametrize("name", ["o0", "o2", "o3"])
def test_layers_are_timed_in_the_type_that_they_compute_in(name: str) -> None:
    model, _, casts = prepared(name)
    graph = ChannelGraph.trace(model, torch.zeros(1, 3, 8, 8, dtype=input_type(model)))
    steps = LayerSteps(graph, 4, lambda: casts.context("cpu"))
    weights = BRAIN if name == "o3" else torch.float32
    assert steps.facts["weights"] == str(weights)
    assert steps.facts["computed_in"] == str(torch.float32 if name == "o0" else BRAIN)


@pytest.mark.parametrize("name", ["o2", "o3"])
def test_the_largest_batch_of_a_format(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["model.width=4", "budget=4MiB", "throughput_seconds=0", "device=cpu"]
    found = []
    with initialize_config_dir(str(schema.CONF)):
        for options in ((), FORMATS[name]):
            config = schema.parse_max_batch(compose("maxbatch", overrides=[*small, *options]))
            found.append(show_max_batch(config, list(options)))
    assert found[1] > 1.2 * found[0]
    assert "largest batch" in capsys.readouterr().out


def test_auto_prepares_what_it_adopts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss scale would not be asked otherwise."""
    chosen = Precision(CPU, HALF)
    monkeypatch.setattr(precisions, "candidates", lambda device: {"o0": Precision(CPU), "o1": chosen})
    run = build_run(config_of("precision=auto"))
    auto.adopt(run, {"precision": "o1"})
    assert run.precision is chosen
    with pytest.raises(UserError, match="a method takes a step by itself"):
        run.optimizer.step()
