"""Our channel spaces against the groups of torch-pruning, an independent implementation; differences explained."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch_pruning
from test_zoo import SMALL, image_size, network
from topologies import TOPOLOGIES
from torch import nn

from morphtrain.morph import ChannelGraph

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
Group = frozenset[tuple[str, str]]  # of (layer, "in" or "out")

# What torch-pruning groups differently, and why. Everything else has to agree. Its groups of the network's own outputs
# (`head`), which it leaves to its user to protect and we do not offer, do not count.
DIFFERENT = {
    "Split": "it changes channels that the code splits by constants [3, 6], and the code then fails",
    "Shuffled": "it loses the half of a chunk that enters `branch.0`",
    "Depthwise": "it prunes a channel multiplier's inputs and outputs apart; ours follow each other",
    "SqueezeExciteLinear": "it ties the one channel of `gate`, which is broadcast, to all those it multiplies",
    "SpatialAttention": "it prunes under a mean over the channels, which changes the mean",
    "Flattened": "it changes a reshape to the constant 7 * 4 * 4, and the code then fails",
    "Transposed": "it does not tie the two groups that read a concatenation",
    "Twice": "it names both layers of a shared weight; our space holds the weight once, under the first",
    "Mixed": "it prunes under a variance over all channels, and what the code splits by constants",
    "Norms": "it prunes under a layer norm, which changes its statistics",
    "SeveralInputs": "it prunes what the network returns",
    "convnext_tiny": "it prunes under a layer norm, which changes its statistics",
}
FAILS = {"shufflenet_v2_x0_5": ZeroDivisionError}


def ours(model: nn.Module, inputs: tuple) -> set[Group]:
    groups = set()
    for space in ChannelGraph.trace(model, inputs).spaces:
        slots = [s for s in space.slots if isinstance(s.axis.module, LAYERS) and "weight" in dict(s.axis.tensors)]
        groups.add(frozenset((s.axis.path, "in" if s.role == "consumes" else "out") for s in slots))
    return groups - {frozenset()}


def theirs(model: nn.Module, inputs: tuple) -> set[Group]:
    names = {module: path for path, module in model.named_modules()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch_pruning.DependencyGraph().build_dependency(model, inputs if len(inputs) > 1 else inputs[0])
        found = list(graph.get_all_groups(root_module_types=list(LAYERS)))
    groups = set()
    for group in found:
        members = set()
        for dependency, _ in group:
            module = dependency.target.module
            if isinstance(module, LAYERS):
                side = "out" if graph.is_out_channel_pruning_fn(dependency.handler) else "in"
                members.add((names[module], side))
        groups.add(frozenset(members))
    return groups


def last_layers(model: nn.Module) -> set[str]:
    """The layers that make the network's outputs."""
    heads = [path for path, module in model.named_modules() if isinstance(module, LAYERS)]
    return {heads[-1]} | {path for path in heads if path.startswith("head")}


NETWORKS: dict[str, Callable[[], tuple[nn.Module, tuple]]] = {
    **{
        name: (lambda m=make, i=inputs: (m(), tuple(x.float() for x in i())))
        for name, (make, inputs) in TOPOLOGIES.items()
    },
    **{
        name: (lambda n=name: (network(n), (torch.randn(1, 3, image_size(n), image_size(n)),)))
        for name in (*SMALL, "convnext_tiny", "vgg11_bn")
    },
}


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in FAILS])
def test_spaces_are_torch_prunings_groups(name: str) -> None:
    model, inputs = NETWORKS[name]()
    model.eval()
    groups = theirs(model, inputs)
    heads = last_layers(model)
    groups -= {g for g in groups if all(layer in heads and side == "out" for layer, side in g)}
    assert (ours(model, inputs) == groups) == (name not in DIFFERENT), DIFFERENT.get(name)


@pytest.mark.parametrize("name", FAILS)
def test_what_torch_pruning_cannot_trace(name: str) -> None:
    model, inputs = NETWORKS[name]()
    assert ours(model, inputs)
    with pytest.raises(FAILS[name]):
        theirs(model.eval(), inputs)
