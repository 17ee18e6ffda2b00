"""Channel surgery on small networks that isolate one topology each, and on random ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import check_surgery
from topologies import OPERATIONS, TOPOLOGIES, Random, images

from morphtrain.morph import ChannelGraph

# name -> sizes of the spaces: what can change by itself. Written by hand from what each network does.
EXPECTED = {
    "DenseBlock": [8, 3, 3],
    "Inception": [8, 4, 6, 5],
    "Chunked": [4, 5, 4],
    "Split": [4, 6],
    "Shuffled": [4, 6],  # the halves stay alike, and so does what is shuffled into them
    "ShuffleLayer": [4, 1, 4],  # three groups shuffled into three groups: all in between is one
    "Grouped": [3, 2, 8],
    "Depthwise": [8],
    "SqueezeExcite": [8, 3],
    "SqueezeExciteLinear": [8, 4],
    "SpatialAttention": [8],
    "Flattened": [4, 5, 6],
    "Transposed": [10, 1, 6, 6],  # 8 + 6 channels in two groups of 7: channel 0 and 7, then 1-6 with the others
    "Twice": [8, 6, 8],
    "Norms": [4, 9, 6],
    "Scaled": [8, 12],
    "Functional": [6, 7],
    "Frozen": [8, 6],
    "SeveralInputs": [],
    "Padded": [4, 6],
    "PixelShuffled": [8, 3, 12],
    "Stacked": [8, 6, 5],
    "PreActivation": [8, 6, 6],
}


@pytest.mark.parametrize("name", TOPOLOGIES)
@pytest.mark.parametrize("trial", range(4))
def test_surgery(name: str, trial: int) -> None:
    torch.manual_seed(trial)
    make, inputs = TOPOLOGIES[name]
    check_surgery(make(), inputs(), tolerance=1e-8, spaces=bool(EXPECTED[name]))


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_spaces_are_what_can_change_alone(name: str) -> None:
    make, inputs = TOPOLOGIES[name]
    graph = ChannelGraph.trace(make().double(), inputs())
    assert sorted(space.size for space in graph.spaces) == sorted(EXPECTED[name])


steps = st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 20), st.integers(0, 20))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(steps=st.lists(steps, min_size=2, max_size=9), seed=st.integers(0, 2**32))
def test_random_networks(steps: list[tuple[str, int, int]], seed: int) -> None:
    torch.manual_seed(seed)
    check_surgery(Random(steps), (images(),), tolerance=1e-7, spaces=None)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(steps=st.lists(steps, min_size=2, max_size=14), seed=st.integers(0, 2**32))
def test_many_random_networks(steps: list[tuple[str, int, int]], seed: int) -> None:
    torch.manual_seed(seed)
    check_surgery(Random(steps), (images(),), tolerance=1e-7, spaces=None)
