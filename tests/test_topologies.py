"""Channel surgery on small networks that isolate one topology each, and on random ones."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import check_surgery, facts
from topologies import OPERATIONS, TOPOLOGIES, Random, images
from torch import nn
from torch.optim import SGD

from morphtrain.morph import ChannelGraph, MorphError

# name -> sizes of the spaces: what can change by itself. Written by hand from what each network does.
EXPECTED = {
    "DenseBlock": [8, 3, 3],
    "Inception": [8, 4, 6, 5],
    "Chunked": [4, 5, 4],
    "Split": [4, 6],
    "Shuffled": [4, 6],  # the halves stay equal in size, and so does what is shuffled into them
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
    "Mixed": [8, 6, 6],
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


class Shapes(nn.Module):
    """Sizes that the code reads off shapes and hands on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.low, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.Linear(8, 5)
        self.plain = torch.ones(8, 1, 1)  # neither parameter nor buffer: nobody can change it

    def forward(self, x):
        x = self.stem(x)
        y = nn.functional.interpolate(self.low(x), size=x.shape[2:])
        b, c = y.shape[:2]
        y = nn.functional.avg_pool2d(x + y, y.size()[2:]).view(b, c)
        return self.head(y)


def test_shapes_are_read_and_tensors_of_the_code_stay() -> None:
    model = Shapes()
    before = set(vars(model))
    graph = check_surgery(model, (images(),), tolerance=1e-8)
    assert [space.size for space in graph.spaces] == [8]
    assert set(vars(model)) == before

    class Plain(Shapes):
        def forward(self, x):
            return self.head((self.stem(x) * self.plain.to(x.dtype)).mean((2, 3)))

    model = Plain()
    model.plain = model.plain.double()
    check_surgery(model, (images(),), tolerance=1e-8, spaces=False)
    assert set(vars(model)) == before


class OneChannel(nn.Module):
    """A single channel that an operation over the channels takes in."""

    def __init__(self, function) -> None:
        super().__init__()
        self.one, self.last, self.function = nn.Conv2d(3, 1, 1), nn.Conv2d(1, 5, 1), function

    def forward(self, x):
        return self.last(self.function(self.one(x))).mean((2, 3))


@pytest.mark.parametrize(
    "function",
    [lambda x: x.sum(1, keepdim=True), lambda x: x.softmax(1), lambda x: x.cumsum(1)],
    ids=["sum", "softmax", "cumsum"],
)
def test_a_single_channel_is_kept_where_a_second_would_be_mixed_with_it(function) -> None:
    assert ChannelGraph.trace(OneChannel(function), images().float()).spaces == []
    (space,) = ChannelGraph.trace(OneChannel(torch.relu), images().float()).spaces
    assert space.size == 1


class Refused(nn.Module):
    def __init__(self, layer: nn.Module, function) -> None:
        super().__init__()
        self.stem, self.layer, self.last, self.function = nn.Conv2d(3, 8, 1), layer, nn.Conv2d(8, 5, 1), function

    def forward(self, x):
        return self.last(self.function(self.layer(self.stem(x))))


REFUSALS = {
    "unknown layer": (nn.Unfold(1), lambda x: x, "Unfold"),
    "unknown function": (nn.Identity(), lambda x: torch.renorm(x, 2, 1, 1.0), "renorm"),
    "control flow": (nn.Identity(), lambda x: x if x.sum() > 0 else -x, "control flow"),
    "channels in a factor": (nn.Identity(), lambda x: x / x.shape[1], "number of channels"),
    "zeros beside": (nn.Identity(), lambda x: x + torch.zeros(1, x.shape[1], 1, 1), "zeros"),
    "matrix product": (nn.Identity(), lambda x: (x.flatten(2) @ x.flatten(2).transpose(1, 2)).unsqueeze(3), "matmul"),
    "written into": (nn.Identity(), lambda x: (x.__setitem__((slice(None), slice(0, 4)), 0.0), x)[1], "setitem"),
    "wrong shape": (nn.Identity(), lambda x: x[:, :, 0].view(-1, 7), "fails on the example"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_followed_is_refused_before_anything_changes(name: str) -> None:
    layer, function, reason = REFUSALS[name]
    model = Refused(layer, function).double()
    before, state, plain = facts(model, SGD(model.parameters(), 0.1)), copy.deepcopy(model.state_dict()), vars(layer)
    plain = dict(plain)
    with pytest.raises(MorphError, match=reason) as caught:
        ChannelGraph.trace(model, images())
    assert "test_topologies.py" in str(caught.value)
    assert facts(model, SGD(model.parameters(), 0.1)) == before
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key])
    assert vars(layer).keys() == plain.keys()
