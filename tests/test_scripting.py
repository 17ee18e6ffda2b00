"""A network that can be scripted still can after its structure was changed."""

from __future__ import annotations

import warnings

import pytest
import torch
from networks import INPUT, SHAPES, assert_close, build, outputs, trace
from topologies import TOPOLOGIES
from torch import nn

from morphtrain.morph import ChannelGraph


def scripted(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would like to be asked for something else
        return torch.jit.script(model)


@pytest.mark.parametrize("shape", SHAPES)
def test_after_a_block_went_from_a_sum(shape: str) -> None:
    model = build(blocks=2, **SHAPES[shape])
    graph = trace(model)
    while graph.blocks:
        graph.remove_block(graph.blocks[-1])
    assert_close(outputs(scripted(model)), outputs(model), 0.0)


@pytest.mark.parametrize("name", ["Inception", "DenseBlock", "PreActivation"])
def test_after_a_branch_went(name: str) -> None:
    make, inputs = TOPOLOGIES[name]
    model, images = make().double(), inputs()
    graph = ChannelGraph.trace(model, images)
    graph.remove_block(next(filter(graph.can_remove, graph.blocks)))
    assert_close(outputs(scripted(model), images), outputs(model, images), 0.0)


def test_after_growth() -> None:
    model = build()
    graph = trace(model)
    graph.insert_layer(graph.layer_places[0], [INPUT])
    graph.insert_block(next(iter(graph.block_places)), [INPUT])
    assert_close(outputs(scripted(model)), outputs(model), 0.0)
