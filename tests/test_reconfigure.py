"""Channel union, block removal, rounding: the spec's worked examples and what must hold for any weights."""

from __future__ import annotations

import copy
import json
import operator

import pytest
import torch
from networks import INPUT, OPTIMIZERS, SHAPES, assert_close, build, chain, mask, outputs, step, trace, twin
from topologies import TOPOLOGIES
from torch import nn

from morphtrain.cost import count_macs
from morphtrain.morph import ChannelGraph, Gate, MorphError, describe, rebuild
from morphtrain.prune.reconfigure import channel_importance, live_channels, reconfigure
from morphtrain.prune.rounding import Rounding


@pytest.mark.parametrize(
    ("producer", "consumer", "left"),
    [
        ({0, 1, 2, 4, 5, 6, 7}, {0, 1, 2, 4, 5, 6, 7}, 7),
        ({0, 1, 2, 3, 5, 6, 7}, {0, 1, 3, 4, 6, 7}, 8),
        ({0, 1}, {1, 2}, 3),
    ],
)
def test_worked_examples_of_channel_union(producer: set[int], consumer: set[int], left: int) -> None:
    model = chain(producer, consumer)
    before = outputs(model)
    change = reconfigure(trace(model), threshold=1e-4)
    assert model[0].out_channels == model[2].in_channels == left
    assert bool(change) == (left < 8)
    for a, b in zip(outputs(model), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def kill(model: nn.Module, fraction: float) -> None:
    """Make a random fraction of the channels of every space dead."""
    for space in trace(model).spaces:
        mask(space, (torch.rand(space.size) < fraction).nonzero().flatten())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fraction", [0.3, 0.8, 0.97])
@pytest.mark.parametrize("round_to", [1, 4])
def test_what_is_dead_goes_and_the_function_stays(shape: str, fraction: float, round_to: int) -> None:
    model = build(
        3,
        width=8,
        layers=3 if "bottleneck" in shape else 2,
        **{key: value for key, value in SHAPES[shape].items() if key != "layers"},
    ).train()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    step(model, optimizer)
    kill(model, fraction)
    graph = trace(model)
    importance = channel_importance(graph)
    whole_branch = {b.path for b in graph.blocks if not importance[b.spaces[-1]].any()}
    early = {b.path for b in graph.blocks if any(not importance[s].any() for s in b.spaces)} - whole_branch
    pointwise = "bottleneck" in shape  # the last convolution has no padding, so that what it puts out is a constant
    before = outputs(model)
    graph = trace(model)
    change = reconfigure(graph, threshold=1e-4, rounding=Rounding(multiple=round_to), optimizer=optimizer)
    assert whole_branch <= set(change.removed_blocks) <= whole_branch | early
    assert not pointwise or early <= set(change.removed_blocks)
    for a, b in zip(outputs(model), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for axis in graph.axes:
        if axis.weight is not None and any(segment.space for segment in axis.segments):
            assert axis.length >= 1
            if round_to > 1 and axis.module is not model.classifier:
                assert axis.length % round_to == 0
    assert not reconfigure(trace(model), threshold=1e-4, rounding=Rounding(multiple=round_to))
    step(model, optimizer)


@pytest.mark.parametrize("last", ["zeros", "replicate", "pointwise", "after relu"])
def test_a_block_that_is_empty_inside_goes_if_what_it_adds_is_a_constant(last: str) -> None:
    """Biases after the empty space reach the sum; zero padding makes them a pattern along the border."""
    model = build(1, width=8, layers=3)
    branch = model.stages[0][0].branch
    at = max(i for i, layer in enumerate(branch) if isinstance(layer, nn.Conv2d))
    if last == "replicate":
        branch[at].padding_mode = "replicate"
        branch[at]._reversed_padding_repeated_twice = [1, 1, 1, 1]
    if last == "pointwise":
        branch[at] = nn.Conv2d(8, 8, 1, bias=True).double()
    if last == "after relu":
        with torch.no_grad():  # the ReLU before the last convolution gives zeros in either mode
            branch[at - 2].bias.fill_(-5.0)
            branch[at - 2].running_mean.zero_()
    graph = trace(model)
    first, inner = graph.blocks[0].spaces
    mask(first, torch.arange(first.size))
    assert channel_importance(graph)[inner].any()
    before = outputs(model)
    change = reconfigure(graph, threshold=1e-4)
    assert ("stages.0.0.branch" in change.removed_blocks) == (last != "zeros")
    assert_close(outputs(model), before, 1e-12)


class TwoInside(nn.Module):
    """A branch whose last convolution reads two layers."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 5)
        self.a, self.b, self.c = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(10, 8, 1)
        self.n = nn.BatchNorm2d(8) if norm else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        return self.head((x + self.n(self.c(torch.cat([self.a(x), self.b(x)], 1)))).mean((2, 3)))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dead", ["a", "b"])
def test_a_block_stays_while_one_of_its_two_inner_layers_is_alive(norm: bool, dead: str) -> None:
    model = TwoInside(norm).double()
    graph = trace(model)
    mask(graph.space(dead), torch.arange(graph.space(dead).size))
    with torch.no_grad():
        model.get_submodule(dead).bias.zero_()
    before = outputs(model)
    assert reconfigure(graph, threshold=1e-4).removed_blocks == [dead]  # from the concatenation
    assert_close(outputs(model), before, 1e-12)


class WritesIntoShortcut(nn.Module):
    """A branch that begins in place: the shortcut is what it leaves behind."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.stem, self.n, self.head = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.first, self.a, self.b = first, nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.n(self.stem(x))
        return self.head((self.b(self.a(self.first(x))) + x).mean((2, 3)))


class Written(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


HEADS = {
    "module": nn.ReLU(inplace=True),
    "behind dropout": nn.Sequential(nn.Dropout(0.0), nn.ReLU(inplace=True)),
    "function": Written(lambda x: nn.functional.silu(x, inplace=True)),
    "positional": Written(lambda x: nn.functional.relu(x, True)),
    "method": Written(lambda x: x.clamp_(min=0)),
    "of a view": Written(lambda x: x.flatten(2).tanh_().view(x.shape)),
    "operator": Written(lambda x: operator.imul(x, 2.0)),
    "copied first": Written(lambda x: (x * 2.0).relu_()),
    "not in place": nn.ReLU(),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_dead_branch_that_writes_into_the_shortcut_stays(name: str) -> None:
    model = WritesIntoShortcut(HEADS[name]).double()
    nn.init.zeros_(model.b.weight)
    nn.init.zeros_(model.a.weight)
    nn.init.zeros_(model.a.bias)
    before = outputs(model)
    removed = reconfigure(trace(model), threshold=1e-4).removed_blocks
    assert bool(removed) == (name in ("copied first", "not in place"))
    assert_close(outputs(model), before, 1e-12)


class Loose(nn.Module):
    """A branch in a container whose layers are called one by one."""

    def __init__(self, container: type, indexed: bool) -> None:
        super().__init__()
        self.stem, self.head, self.indexed = nn.Conv2d(3, 8, 1), nn.Linear(8, 5), indexed
        layers = [nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8)]
        self.branch = nn.Sequential(*layers) if container is nn.Sequential else nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = y = self.stem(x).relu()
        for i, layer in enumerate(self.branch):
            y = self.branch[i](y) if self.indexed else layer(y)
        return self.head((x + y).mean((2, 3)))


@pytest.mark.parametrize("container", [nn.ModuleList, nn.Sequential])
@pytest.mark.parametrize("indexed", [True, False])
def test_a_dead_branch_in_a_container_that_nobody_calls_is_removed_layer_by_layer(
    container: type, indexed: bool
) -> None:
    model = Loose(container, indexed).double()
    fresh = copy.deepcopy(model)
    graph = trace(model)
    mask(graph.space("branch.0"), torch.arange(6))
    before = outputs(model)
    assert len(reconfigure(graph, threshold=1e-4).removed_blocks) == 1
    assert_close(outputs(model), before, 1e-12)
    assert model.branch[0].__class__.__name__ == "NoChannels"
    rebuilt = rebuild(fresh, json.loads(json.dumps(describe(model))))
    rebuilt.load_state_dict(model.state_dict())
    assert_close(outputs(rebuilt), before, 1e-12)


def test_a_group_norm_after_a_bias_keeps_its_block() -> None:
    """What it gives for a bias differs by channel; what it gives for zeros does not."""

    class Net(nn.Module):
        def __init__(self, bias: bool) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1, bias=bias)
            self.n, self.head = nn.GroupNorm(2, 8), nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x).relu()
            return self.head((x + self.n(self.b(self.a(x)))).mean((2, 3)))

    for bias in (True, False):
        model = Net(bias).double()
        graph = trace(model)
        mask(graph.space("a"), torch.arange(6))
        before = outputs(model)
        assert bool(reconfigure(graph, threshold=1e-4).removed_blocks) == (not bias)
        assert_close(outputs(model), before, 1e-12)


def test_removing_a_block_frees_channels_only_it_used() -> None:
    model = build(2, width=8)
    with torch.no_grad():
        graph = trace(model)
        residual = graph.spaces[0]
        mask(residual, torch.tensor([5]))
        block = model.stages[0][1]
        block.branch[0].weight[:, 5] = 1.0  # alive, but only as an input of a block that is about to go
        inner = next(s for s in graph.spaces if s.name.startswith("stages.0.1"))
        for slot in inner.slots:
            if slot.role == "consumes":
                slot.axis.module.weight.zero_()
            if slot.role == "produces":
                slot.axis.module.weight.zero_()
    reconfigure(trace(model), threshold=1e-4)
    assert model.stem[0].out_channels == 7


@pytest.mark.parametrize("least", [1, 3])
def test_a_chain_keeps_its_strongest_channels(least: int) -> None:
    model = chain(set(), set())
    with torch.no_grad():
        model[0].weight[5] = 9e-5  # dead, but the least so
    reconfigure(trace(model), threshold=1e-4, rounding=Rounding(min_channels=least))
    assert model[0].out_channels == least
    assert (model[0].weight.detach().abs().amax((1, 2, 3)) > 8e-5).any()


def test_rounding_keeps_the_strongest_dead_channels() -> None:
    model = chain({0, 1, 2}, {0, 1, 2})
    with torch.no_grad():
        model[2].weight[:, 6] = 5e-5
    reconfigure(trace(model), threshold=1e-4, rounding=Rounding(multiple=4))
    assert model[0].out_channels == 4
    assert torch.isclose(model[2].weight.abs().amax((0, 2, 3)), torch.tensor(5e-5).double()).any()


def test_live_channels_counts_the_union() -> None:
    model = chain({0, 1}, {1, 2})
    graph = trace(model)
    assert live_channels(graph, 1e-4) == 3 + 4
    assert live_channels(graph, 0.0) == 8 + 4


def test_zero_branches_survive_a_second_trace() -> None:
    model = build(2, width=8)
    graph = trace(model)
    graph.remove_block(graph.blocks[1])
    again = trace(model)
    assert [(s.name, s.size) for s in again.spaces] == [(s.name, s.size) for s in graph.spaces]
    untouched = copy.deepcopy(model)
    again.reindex(again.spaces[0], range(again.spaces[0].size))
    torch.testing.assert_close(model.eval()(INPUT), untouched.eval()(INPUT))


class Blocks(nn.Module):
    """Residual blocks without a module of their own for the branch, as in torchvision, of three kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(8, 6, 3, 2, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Conv2d(8, 8, 1, 2)
        self.pre = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3, padding=1), nn.ReLU())
        self.last = nn.Conv2d(5, 8, 3, padding=1)
        self.drop = nn.Dropout(0.0)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.stem(x))
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.down(x)
        x = self.relu(out)
        x = x + self.drop(self.last(self.pre(x)))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("number", [0, 1])
def test_blocks_that_are_code_can_be_removed(number: int) -> None:
    model = Blocks().double().train()
    make = OPTIMIZERS["sgd"]
    optimizer = make(model.parameters())
    step(model, optimizer)
    masked, masked_optimizer = twin(model, make, optimizer)
    fresh = copy.deepcopy(model)
    graph = trace(model)
    assert [block.path for block in graph.blocks] == ["conv2", "last"]
    block = trace(masked).blocks[number]
    mask(block.spaces[-1], torch.arange(block.spaces[-1].size))
    if number == 0:  # what the first convolution's bias gives, the norm after it centres to its own bias: dead too
        masked.conv2.weight.data.zero_()
    graph.remove_block(graph.blocks[number], optimizer)
    for a, b in zip(outputs(model), outputs(masked), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))
    step(model, optimizer)
    step(masked, masked_optimizer)
    for name in ("stem.weight", "down.weight", "head.weight"):
        torch.testing.assert_close(model.get_parameter(name), masked.get_parameter(name), rtol=1e-7, atol=1e-9)
    space = graph.space("stem")
    graph.reindex(space, [0, 2, 5], optimizer)
    graph = trace(model)
    for space in graph.spaces:
        graph.reindex(space, [0, 0, 1])
    rebuilt = rebuild(fresh, json.loads(json.dumps(describe(model))))
    rebuilt.load_state_dict(model.state_dict())
    for a, b in zip(outputs(rebuilt), outputs(model), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["DenseBlock", "Inception"])
def test_a_layer_that_is_concatenated_can_go_as_a_whole(name: str) -> None:
    make, inputs = TOPOLOGIES[name]
    torch.manual_seed(0)
    model = make().double().train()
    fresh, x = copy.deepcopy(model), inputs()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    graph = ChannelGraph.trace(model, x)
    block = graph.blocks[1]
    (space,) = block.outputs
    mask(space, torch.arange(space.size))
    for slot in space.slots:
        if slot.role == "elementwise":
            slot.axis.module.bias.data[slot.start : slot.start + space.size] = 0.0
    expected = outputs(model, x)
    assert graph.can_remove(block)
    change = reconfigure(graph, threshold=1e-4, optimizer=optimizer)
    assert change.removed_blocks == [block.path]
    assert space not in graph.spaces
    for a, b in zip(outputs(model, x), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))
    model(*x).sum().backward()
    optimizer.step()
    rebuilt = rebuild(fresh, json.loads(json.dumps(describe(model))))
    rebuilt.load_state_dict(model.state_dict())
    for a, b in zip(outputs(rebuilt, x), outputs(model, x), strict=True):
        assert torch.equal(a, b)


class Forked(nn.Module):
    """Two convolutions of the same input, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1), nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Linear(11, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(torch.cat([self.left(x), self.right(x)], 1).relu().mean((2, 3)))


def test_the_last_operand_of_a_concatenation_stays() -> None:
    model = Forked().double()
    graph = trace(model)
    for block in graph.blocks:
        mask(block.outputs[0], torch.arange(block.outputs[0].size))
    assert reconfigure(graph, threshold=1e-4).removed_blocks == ["left"]
    assert model.head.in_features == model.right.out_channels == 1
    assert [block.path for block in graph.blocks] == ["right"]
    assert not graph.can_remove(graph.blocks[0])
    with pytest.raises(MorphError, match="no channel left"):
        graph.remove_block(graph.blocks[0])
    outputs(model)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rounds", [1, 3])
def test_gating_keeps_the_function_and_the_next_step(shape: str, rounds: int) -> None:
    model = build(2, width=6, **SHAPES[shape]).train()
    make = OPTIMIZERS["sgd"]
    optimizer = make(model.parameters())
    step(model, optimizer)
    fresh = copy.deepcopy(model)
    union = copy.deepcopy(model)
    for number in range(rounds):
        with torch.no_grad():
            for index, module in enumerate(m for m in model.modules() if isinstance(m, nn.Conv2d)):
                dead = torch.rand(module.weight.shape[0], generator=torch.Generator().manual_seed(99 * number + index))
                module.weight[dead < 0.3] = 0.0
                dead = torch.rand(module.weight.shape[1], generator=torch.Generator().manual_seed(77 * number + index))
                if module.in_channels != 3:
                    module.weight[:, dead < 0.3] = 0.0
        masked, masked_optimizer = twin(model, make, optimizer)
        before = outputs(model)
        graph = trace(model)
        change = reconfigure(graph, threshold=1e-4, residual="gating", optimizer=optimizer)
        assert change.gated
        for a, b in zip(outputs(model), before, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        step(model, optimizer)
        step(masked, masked_optimizer)
    if rounds == 1:
        reconfigure(trace(union), threshold=1e-4)
        assert count_macs(model, (3, 8, 8)) < count_macs(union, (3, 8, 8))
    assert [(s.name, s.size) for s in trace(model).spaces] == [(s.name, s.size) for s in graph.spaces]
    rebuilt = rebuild(fresh, json.loads(json.dumps(describe(model))))
    rebuilt.load_state_dict(model.state_dict())
    for a, b in zip(outputs(rebuilt), outputs(model), strict=True):
        assert torch.equal(a, b)
    # Gated networks can be cut and widened on.
    for space in list(graph.spaces):
        graph.reindex(space, range(max(1, space.size - 1)), optimizer)
    before = outputs(model)
    for space in list(graph.spaces):
        graph.reindex(space, [*range(space.size), 0], optimizer)
    for a, b in zip(outputs(model), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_gate_that_would_lose_something_is_refused() -> None:
    model = Blocks().double()
    graph = trace(model)
    with pytest.raises(MorphError, match="bias"):
        graph.gate({"conv2": Gate(writes=torch.tensor([0]))})
    with pytest.raises(MorphError, match="not a convolution"):
        graph.gate({"head": Gate(reads=torch.tensor([0]))})


class Tied(nn.Module):
    """Blocks of a convolution each: two with one weight, one that is used under two names, and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c, self.own = (
            nn.Conv2d(inputs, 8, 1, bias=False) for inputs in (3, 8, 8, 8, 8)
        )
        self.b.weight, self.d = self.a.weight, self.c
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for layer in (self.a, self.b, self.c, self.d, self.own):
            x = x + layer(x.relu())
        return self.head(x.mean((2, 3)))


def test_layers_that_are_tied_are_not_gated() -> None:
    torch.manual_seed(0)
    model = Tied().double()
    with torch.no_grad():
        for layer in (model.a, model.c, model.own):
            layer.weight[:2] = 0.0
            layer.weight[:, 5] = 0.0
    before = outputs(model)
    graph = trace(model)
    assert reconfigure(graph, residual="gating").gated == ["own"]
    assert_close(outputs(model), before, 1e-12)
    for path in ("a", "b", "c"):
        with pytest.raises(MorphError, match=f"'{path}' cannot be gated: it is used under another name, too, or its"):
            graph.gate({path: Gate(reads=torch.tensor([0]))})
    step(model, OPTIMIZERS["sgd"](model.parameters()))


class Sharing(nn.Module):
    """A branch with a parameter of its own, a layer used twice, and a weight that it shares with the outside."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.twice = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 6, 1)
            self.narrow, self.scale = nn.Conv2d(6, 5, 1), nn.Parameter(torch.ones(5, 1, 1))
            self.last, self.norm = nn.Conv2d(5, 8, 1, bias=False), nn.BatchNorm2d(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.last(self.narrow(self.twice(self.twice(self.first(x)).relu())) * self.scale))

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.stem, self.branch, self.other = nn.Conv2d(3, 8, 1), Sharing.Branch(), nn.Conv2d(8, 6, 1)
        if shared:
            self.other.weight = self.branch.first.weight
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(self.other(self.branch(x) + x).mean((2, 3)))


def test_a_branch_that_shares_a_weight_with_the_outside_is_no_block() -> None:
    assert trace(Sharing(shared=True).double()).blocks == []


def test_a_branch_goes_with_all_it_holds_and_its_norm_keeps_its_mode() -> None:
    model = Sharing(shared=False).double().train()
    model.branch.norm.eval()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    step(model, optimizer)
    graph = trace(model)
    (block,) = graph.blocks
    assert block.path == "branch"
    graph.remove_block(block, optimizer)
    assert not model.branch.norm.training
    assert set(optimizer.param_groups[0]["params"]) == set(model.parameters())
    assert set(optimizer.state) == set(model.parameters())
    for space in list(graph.spaces):
        graph.reindex(space, range(space.size - 1), optimizer)
    assert set(optimizer.param_groups[0]["params"]) == set(model.parameters())
    step(model, optimizer)
    step(model, optimizer)
