"""Channel surgery on networks that nobody tuned it to: every classification CNN of torchvision that torch.fx traces."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
from collections.abc import Iterator

import pytest
import torch
from networks import assert_close, check_surgery, mask, outputs
from torch import nn
from torchvision import models

from morphtrain.morph import ChannelGraph, MorphError, describe, rebuild
from morphtrain.prune.reconfigure import reconfigure

# Attention mixes channels in ways that no reindexing of channels survives; these are refused by name.
REFUSED = {
    "maxvit_t": "einsum",
    "swin_b": "relative_position_bias",
    "swin_s": "relative_position_bias",
    "swin_t": "relative_position_bias",
    "swin_v2_b": "relative_position_bias",
    "swin_v2_s": "relative_position_bias",
    "swin_v2_t": "relative_position_bias",
    "vit_b_16": "MultiheadAttention",
    "vit_b_32": "MultiheadAttention",
    "vit_h_14": "MultiheadAttention",
    "vit_l_16": "MultiheadAttention",
    "vit_l_32": "MultiheadAttention",
}
CNNS = [name for name in models.list_models(module=models) if name not in REFUSED]
# One small member of each family; the others differ in size and run with the slow tests.
SMALL = (
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
)


@pytest.fixture(autouse=True)
def no_network_stays() -> Iterator[None]:
    """Networks of gigabytes are in cycles, of their graphs and of errors that were caught."""
    yield
    gc.collect()


def network(name: str) -> nn.Module:
    """A network of torchvision with weights that keep signals alive, without dropping anything at random."""
    options = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    # regnet computes its widths with tensors, which the meta device cannot.
    with contextlib.nullcontext() if name.startswith("regnet") else torch.device("meta"):
        model = models.get_model(name, num_classes=7, **options)
    model = model.to_empty(device="cpu") if next(model.parameters()).is_meta else model
    for module in model.modules():
        if hasattr(module, "p"):
            module.p = 0.0
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=(2 / (parameter.numel() / parameter.shape[0])) ** 0.5)
            elif parameter_name == "weight":
                nn.init.uniform_(parameter, 0.5, 1.5)
            else:
                nn.init.normal_(parameter, std=0.2)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            module.num_batches_tracked.zero_()
    return model


def image_size(name: str) -> int:
    """Small, but enough for the network's pools."""
    return 96 if name == "inception_v3" else 64


@pytest.mark.parametrize(
    "name", [name if name in SMALL else pytest.param(name, marks=pytest.mark.slow) for name in CNNS]
)
def test_torchvision(name: str) -> None:
    x = torch.randn(2, 3, image_size(name), image_size(name), dtype=torch.double)
    model = network(name)
    large = sum(p.numel() for p in model.parameters()) > 2e8  # whose momentum would not fit a small machine's memory
    check_surgery(model, (x,), tolerance=1e-8, momentum=0.0 if large else 0.9)


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("maxvit_t", "vit_b_16", "swin_t") else pytest.param(name, marks=pytest.mark.slow)
        for name in REFUSED
    ],
)
def test_attention_is_refused_by_name(name: str) -> None:
    model = models.get_model(name, num_classes=7)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MorphError, match=REFUSED[name]) as caught:
        ChannelGraph.trace(model, torch.empty(1, 3, 224, 224))
    assert "torchvision/models/" in str(caught.value)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])


@pytest.mark.parametrize(
    "name",
    ["densenet121", "efficientnet_b0", "googlenet", "mobilenet_v2", "regnet_y_400mf", "resnet18", "squeezenet1_1"],
)
def test_blocks_of_torchvision_can_be_removed(name: str) -> None:
    """Of each network the first, a middle and the last block, and the network comes back from its description."""
    x = (torch.randn(2, 3, 64, 64, dtype=torch.double),)
    model = network(name).double().train()
    fresh = copy.deepcopy(model)
    masked = copy.deepcopy(model)
    graph, masked_graph = ChannelGraph.trace(model, x), ChannelGraph.trace(masked, x)
    count = len(graph.blocks)
    assert count >= 8
    for number in (0, count // 2, count - 1):
        block = masked_graph.blocks[number]
        for space in block.outputs if block.kind == "cat" else block.spaces[-1:]:
            mask(space, torch.arange(space.size))
    for block in [graph.blocks[number] for number in (0, count // 2, count - 1)]:
        graph.remove_block(block)
    result = outputs(model, x)
    assert_close(result, outputs(masked, x), 1e-8)
    assert len(list(model.parameters())) < len(list(masked.parameters()))
    rebuilt = rebuild(fresh, json.loads(json.dumps(describe(model))))
    rebuilt.load_state_dict(model.state_dict())
    for a, b in zip(outputs(rebuilt, x), result, strict=True):
        assert torch.equal(a, b)
    again = ChannelGraph.trace(model, x)
    # A space is named after its first producer, which may have been in a removed block.
    assert sorted(space.size for space in again.spaces) == sorted(space.size for space in graph.spaces)


def test_an_empty_squeeze_does_not_empty_its_block() -> None:
    """The gate of a squeeze-and-excitation then is a constant, and the branch goes on."""
    model = network("efficientnet_b0")
    graph = ChannelGraph.trace(model, torch.empty(1, 3, 64, 64))
    squeezes = [space for space in graph.spaces if space.name.endswith("fc1")]
    assert len(squeezes) == 16
    assert not any(space in squeezes for block in graph.blocks for space in block.spaces)
    for space in squeezes:
        mask(space, torch.arange(space.size))
    assert reconfigure(graph, threshold=1e-4).removed_blocks == []
