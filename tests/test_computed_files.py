"""Networks with computed weights as files: checkpoints, exports, and runs that are resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from computed_layers import (
    Net,
    Wrap,
    X,
    made,
    twice,
)
from networks import assert_close, outputs
from test_own_parts import DENSE
from test_resume import assert_same, contents
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.optim import SGD

import morphtrain
from morphtrain.export.write import export
from morphtrain.method import Method
from morphtrain.morph import ChannelGraph, MorphError, describe, rebuild
from morphtrain.morph.effective import trained
from morphtrain.preprocessing import Preprocessing
from morphtrain.state import Run
from morphtrain.trainer import train


@pytest.mark.parametrize("wrap", [weight_norm, spectral_norm, twice], ids=["weight norm", "spectral norm", "own"])
def test_a_cut_network_is_saved_loaded_and_exported(wrap: Wrap, tmp_path: Path) -> None:
    model = made(wrap)
    graph = ChannelGraph.trace(model, X)
    graph.reindex_spaces({space: range(space.size - 2) for space in graph.spaces})
    morphtrain.save(model, tmp_path / "net.pt")
    loaded = morphtrain.load(tmp_path / "net.pt", model=Net(wrap))
    assert_same(loaded.state_dict(), model.state_dict())
    assert_close(outputs(loaded, (X,)), outputs(model, (X,)), 0.0)
    with pytest.raises(morphtrain.errors.UserError, match="it holds weights that are computed"):
        morphtrain.load(tmp_path / "net.pt", model=Net())
    assert [space.size for space in ChannelGraph.trace(loaded, X).spaces] == [space.size for space in graph.spaces]
    before = type(model.a)
    export(model, tmp_path / "net.state_dict.pt", "state_dict", Preprocessing(input_shape=(3, 8, 8)))
    assert type(model.a) is before and trained(model.a)
    values = torch.load(tmp_path / "net.state_dict.pt", weights_only=True)
    assert not [name for name in values if "parametrizations" in name]
    bare = rebuild(Net().double(), json.loads((tmp_path / "net.architecture.json").read_text()))
    bare.load_state_dict(values)
    assert_close(outputs(bare.eval(), (X,))[1:] * 2, outputs(model, (X,))[1:] * 2, 1e-12)


def test_a_plain_network_takes_the_structure_of_a_computed_one() -> None:
    """As a run does whose method has weights computed: first the structure, then the method, then the values."""
    model = made(spectral_norm)
    graph = ChannelGraph.trace(model, X)
    graph.reindex_spaces({space: range(space.size - 2) for space in graph.spaces})
    other = rebuild(Net().double(), json.loads(json.dumps(describe(model))))
    for path in ("stem", "a", "b", "grouped", "depthwise", "up", "head"):
        spectral_norm(other.get_submodule(path))
    other.load_state_dict(model.state_dict())
    assert_close(outputs(other, (X,)), outputs(model, (X,)), 0.0)


def test_a_description_cannot_give_a_kernel_another_size() -> None:
    description = describe(made(weight_norm))
    description["shapes"]["a.parametrizations.weight.original1"] = [6, 8, 5, 5]
    with pytest.raises(MorphError, match="no surgery makes"):
        rebuild(Net(weight_norm), description)


class Normed(Method):
    """Weight norm on every convolution, spectral norm on the classifier, once the network is made."""

    def after_build(self, run: Run) -> None:
        for module in list(run.model.modules()):
            if isinstance(module, nn.Conv2d):
                weight_norm(module)
        spectral_norm(run.model.classifier)  # type: ignore[arg-type]
        run.optimizer = SGD(run.model.parameters(), lr=0.05, momentum=0.9)


def interrupted(record: Mapping[str, float]) -> bool:
    if record["epoch"] == 3:
        raise KeyboardInterrupt
    return False


def test_a_run_that_grows_computed_weights_is_resumed_to_the_same_bits(tmp_path: Path) -> None:
    overrides = (*DENSE, "tracking=none", "device=cpu", "grow=wider", "grow.factor=1.5", "grow.at_epochs=[2]")
    overrides += (f"methods=[{{_target_: {__name__}.Normed}}]", "epochs=5")
    config = morphtrain.compose(*overrides)
    once, twice = tmp_path / "once", tmp_path / "twice"
    for place in (once, twice):
        place.mkdir()
    train(config, once, {})
    with pytest.raises(KeyboardInterrupt):
        train(config, twice, {}, on_epoch=interrupted)
    train(
        morphtrain.compose(*overrides, f"methods=[{{_target_: {__name__}.Normed}}]", "epochs=5", "resume=auto"),
        twice,
        {},
    )
    ends = [contents(place / "last.pt") for place in (once, twice)]
    assert_same(ends[0], ends[1])
    widths = ends[0]["facts"]["architecture"]["widths"]
    assert 12 in {layer.get("out_channels") for layer in widths.values()}, "it has grown"
