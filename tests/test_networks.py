"""Networks pruned in a loop of one's own: saved, and loaded into what is built anew."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from torch import nn

import morphtrain
from morphtrain.errors import UserError
from morphtrain.model import MobileNet, ResNet
from morphtrain.morph import ChannelGraph, Gate
from morphtrain.norm.ghost import to_ghost
from morphtrain.preprocessing import Preprocessing
from morphtrain.trainer import checkpoint, checkpoint_file
from morphtrain.trainer.build import build_run

EXAMPLE = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def resnet() -> nn.Module:
    return ResNet(stages=2, blocks=2, width=8)


def ghost() -> nn.Module:
    model = ResNet(stages=2, blocks=2, width=8)
    to_ghost(model, 4)
    return model


def mobilenet() -> nn.Module:
    return MobileNet(width_multiplier=0.25)


class Net(nn.Module):
    """A network of one's own: a concatenation, layers used by code, values that JSON does not hold."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))
        self.classifier = nn.Linear(2 * width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.classifier(torch.cat([x, self.branch(x)], 1).relu().mean((2, 3)))


def narrower(graph: ChannelGraph) -> None:
    graph.reindex_spaces({space: range(0, space.size, 2) for space in graph.spaces})


def without_blocks(graph: ChannelGraph) -> None:
    narrower(graph)
    for _ in range(2):
        graph.remove_block(graph.blocks[0])


def gated(graph: ChannelGraph) -> None:
    reads, writes = Gate(reads=torch.tensor([0, 2])), Gate(writes=torch.tensor([1, 3]))
    graph.gate({"stages.0.1.branch.0": reads, "stages.0.1.branch.3": writes})


def grown(graph: ChannelGraph) -> None:
    graph.insert_block(graph.stage_ends[0].path)
    graph.insert_layer(graph.layer_places[0], [EXAMPLE])


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[ChannelGraph], None]]] = {
    "resnet": (resnet, narrower),
    "without blocks": (resnet, without_blocks),
    "gated": (resnet, gated),
    "grown": (resnet, grown),
    "ghost": (ghost, without_blocks),
    "mobilenet": (mobilenet, narrower),
    "own": (Net, narrower),
}


def pruned(case: str) -> nn.Module:
    """A network of another structure than its constructor gives, with values unlike those of a new one."""
    make, change = CASES[case]
    model = make()
    change(ChannelGraph.trace(model, EXAMPLE[:1]))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) / 10)
    return model


@pytest.mark.parametrize("case", CASES)
def test_it_comes_back(case: str, tmp_path: Path) -> None:
    model = pruned(case)
    morphtrain.save(model, tmp_path / "net.pt")
    loaded = morphtrain.load(tmp_path / "net.pt", model=CASES[case][0]())
    assert not loaded.training
    assert torch.equal(loaded(EXAMPLE), model.eval()(EXAMPLE))
    assert torch.equal(loaded.train()(EXAMPLE), model.train()(EXAMPLE))
    narrower(ChannelGraph.trace(loaded, EXAMPLE[:1]))  # and can be pruned on


@pytest.mark.parametrize("case", CASES)
def test_one_that_was_loaded_is_as_good_as_a_new_one(case: str, tmp_path: Path) -> None:
    """It has some of the layers already: those of the earlier surgery."""
    model = pruned(case)
    before = copy.deepcopy(model)
    graph = ChannelGraph.trace(model, EXAMPLE[:1])
    graph.reindex(graph.spaces[0], range(graph.spaces[0].size - 1))
    morphtrain.save(model, tmp_path / "net.pt")
    loaded = morphtrain.load(tmp_path / "net.pt", model=before)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(loaded(EXAMPLE), model.eval()(EXAMPLE))


def test_classes_and_functions_work_too(tmp_path: Path) -> None:
    model = Net(num_classes=4)
    narrower(ChannelGraph.trace(model, EXAMPLE[:1]))
    said = Preprocessing([0.5] * 3, [0.2] * 3, 1, None, (3, 16, 16), 4, ["a", "b", "c", "d"])
    morphtrain.save(model, tmp_path / "net.pt", said)
    assert morphtrain.load_preprocessing(tmp_path / "net.pt") == said
    for make in (Net, lambda: Net(4)):
        assert torch.equal(morphtrain.load(tmp_path / "net.pt", make)(EXAMPLE), model.eval()(EXAMPLE))
    with pytest.raises(UserError, match="makes a str"):
        morphtrain.load(tmp_path / "net.pt", lambda: "text")


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_number_and_memory_formats_are_kept(kind: torch.dtype, tmp_path: Path) -> None:
    model = pruned("resnet").to(kind).to(memory_format=torch.channels_last)
    morphtrain.save(model, tmp_path / "net.pt")
    loaded = morphtrain.load(tmp_path / "net.pt", resnet())
    for name, parameter in model.named_parameters():
        other = loaded.get_parameter(name)
        assert torch.equal(other, parameter)
        assert (other.dtype, other.stride()) == (parameter.dtype, parameter.stride())
    assert torch.equal(loaded(EXAMPLE.to(kind)), model.eval()(EXAMPLE.to(kind)))


def test_a_run_takes_a_network_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nets.py").write_text("from test_networks import Net\n")
    monkeypatch.syspath_prepend(tmp_path)
    quick = [option for option in SMALL if not option.startswith("model.")]
    run = build_run(morphtrain.compose(*quick, "model=custom", "model._target_=nets.Net", "+model.width=6"))
    narrower(run.graph)
    checkpoint.save(run, tmp_path, None)
    x = EXAMPLE[:, :, :8, :8]
    assert torch.equal(morphtrain.load(tmp_path / "last.pt", Net(width=6))(x), run.model.eval()(x))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    morphtrain.save(pruned("resnet"), path)
    with pytest.raises(UserError, match=r"holds a morphtrain.model.resnet.ResNet without what makes it; pass model="):
        morphtrain.load(path)
    with pytest.raises(UserError, match="not the network it was written with"):
        morphtrain.load(path, Net())
    with pytest.raises(UserError, match=r"a Tensor; a torch\.nn\.Module"):
        morphtrain.save(torch.zeros(1), path)
    with pytest.raises(UserError, match=r"architecture|format"):
        checkpoint.Checkpoint(path)  # a run goes on from runs only
    with pytest.raises(UserError, match=r"there is no directory .*nowhere; make it first"):
        morphtrain.save(resnet(), tmp_path / "nowhere" / "net.pt")
    with pytest.raises(UserError, match=r"preprocessing is a dict; .*Preprocessing, or None, works"):
        morphtrain.save(resnet(), path, {"mean": 1})


def test_a_file_decides_nothing(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    morphtrain.save(pruned("resnet"), path)
    content = torch.load(path, weights_only=True)
    facts = json.loads(content["facts"])
    evil = ({"network": "os.system"}, {"memory_format": "os.system"}, {"network": ["x"]}, {"architecture": None})
    for change in evil:
        checkpoint_file.write(path, {**content, "facts": json.dumps(facts | change)})
        with pytest.raises(UserError):
            morphtrain.load(path)
    before = os.listdir(tmp_path)
    checkpoint_file.write(path, {**content, "facts": json.dumps(facts | {"preprocessing": {"mean": "x"}})})
    with pytest.raises(UserError, match="mean"):
        morphtrain.load_preprocessing(path)
    assert os.listdir(tmp_path) == before


@pytest.mark.parametrize("own", [False, True], ids=["ours", "own"])
def test_a_network_of_a_run_is_saved_as_complete_as_it_was_loaded(
    own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nets_again.py").write_text("from test_networks import Net\nclass Mine(Net):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    quick = [option for option in SMALL if not option.startswith("model.")]
    model = ["model=custom", "model._target_=nets_again.Mine", "+model.width=6"] if own else ["norm=ghost"]
    run = build_run(morphtrain.compose(*quick, *model))
    narrower(run.graph)
    checkpoint.save(run, tmp_path, None)
    loaded = copy.deepcopy(morphtrain.load(tmp_path / "last.pt")).to(torch.float64)
    x = EXAMPLE[:, :, :8, :8].double()
    narrower(ChannelGraph.trace(loaded, x[:1]))
    morphtrain.save(loaded, tmp_path / "less.pt")
    again = morphtrain.load(tmp_path / "less.pt")
    assert torch.equal(again(x), loaded.eval()(x))
    assert morphtrain.load_preprocessing(tmp_path / "less.pt") == morphtrain.load_preprocessing(tmp_path / "last.pt")
    morphtrain.save(again, tmp_path / "less.pt", Preprocessing(num_classes=3))
    assert morphtrain.load_preprocessing(tmp_path / "less.pt").num_classes == 3
    with pytest.raises(UserError, match="not a checkpoint of MorphTrain"):
        checkpoint.Checkpoint(tmp_path / "less.pt").check_run()  # no run goes on from a network


class LargeKernels(Net):
    """The names and numbers of channels of `Net`."""

    def __init__(self) -> None:
        super().__init__()
        self.branch[0] = nn.Conv2d(8, 8, 5, padding=2)


def test_kernels_of_another_size_are_refused(tmp_path: Path) -> None:
    morphtrain.save(pruned("own"), tmp_path / "net.pt")
    with pytest.raises(UserError, match=r"weight of a Conv2d is \(8, 8, 5, 5\), which no surgery makes \(4, 4, 3, 3\)"):
        morphtrain.load(tmp_path / "net.pt", LargeKernels())
