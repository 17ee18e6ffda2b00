"""Growing keeps the function: widening, layers, blocks, and chains of them, on every network of the zoo."""

from __future__ import annotations

import copy
import json
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import (
    INPUT,
    LABELS,
    OPTIMIZERS,
    SHAPES,
    assert_close,
    build,
    dropped,
    mask,
    outputs,
    random_keep,
    step,
    trace,
)
from test_zoo import CNNS, SMALL, image_size, network
from torch import nn
from torch.nn import functional as F

from morphtrain.cost import WidthCost
from morphtrain.grow.expand import expand_to
from morphtrain.grow.net2deeper import insert_block_like
from morphtrain.grow.net2net import _copies, widen
from morphtrain.model import ResNet
from morphtrain.model.mobilenet import MobileNet
from morphtrain.model.vgg import VGG
from morphtrain.morph import ChannelGraph, MorphError, Start, describe, rebuild
from morphtrain.morph.surgery.statistics import measure_inputs

OWN = {
    "resnet20": lambda: ResNet(blocks=3),
    "vgg11": lambda: VGG(depth=11, width=16),
    "vgg8 plain": lambda: VGG(depth=8, width=8, batch_norm=False),
    "mobilenet_v1": lambda: MobileNet(version=1, width_multiplier=0.25),
    "mobilenet_v2": lambda: MobileNet(version=2, width_multiplier=0.25),
}
STARTS = ("zero_gamma", "half_half")


def evaluated(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad():
        result = model.eval()(x)
    for module, mode in modes:
        module.training = mode
    return result


def assert_kept(model: nn.Module, x: torch.Tensor, before: torch.Tensor, tolerance: float = 1e-8) -> None:
    after = evaluated(model, x)
    assert before.abs().max() > 0
    assert float((after - before).abs().max() / before.abs().max()) <= tolerance


def rounding(model: nn.Module, x: torch.Tensor) -> float:
    """How far rounding alone moves the output: untrained deep networks can amplify it by many orders of magnitude."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 1e-15 * torch.randn_like(parameter))
    expected = evaluated(model, x)
    return float((evaluated(other, x) - expected).abs().max() / expected.abs().max())


def check_growth(model: nn.Module, x: torch.Tensor) -> ChannelGraph:
    """Every operator on a network that has been trained for a step; a rebuilt copy and the next step agree."""
    model = model.double().train()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    labels = torch.arange(len(x))
    F.cross_entropy(model(x), labels).backward()  # whose gradients stay small, however large untrained outputs are
    optimizer.step()
    optimizer.zero_grad()
    first = copy.deepcopy(model)
    before = evaluated(model, x)
    tolerance = max(1e-8, 100 * rounding(model, x))
    assert tolerance < 0.01, "too coarse to notice a mistake"
    graph = ChannelGraph.trace(model, x[:1])
    widen(graph, 1.3, noise=0.5, optimizer=optimizer)
    assert_kept(model, x, before, tolerance)
    if graph.layer_places:
        graph.insert_layer(graph.layer_places[:: max(1, len(graph.layer_places) // 3)], [x], optimizer=optimizer)
        assert_kept(model, x, before, tolerance)
    for start in STARTS:
        ends = graph.stage_ends
        for end in [*ends[:1], *ends[1:][-1:]] if len(ends) > 5 else ends:
            graph.insert_block(end.path, [x], start=start, optimizer=optimizer)
        assert_kept(model, x, before, tolerance)
    names = [name for name, _ in model.named_parameters()]
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in model.parameters()} == {id(p) for p in grouped} and len(grouped) == len(names)
    rebuilt = rebuild(first, json.loads(json.dumps(describe(model))))
    assert [name for name, _ in rebuilt.named_parameters()] == names
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(evaluated(rebuilt, x), evaluated(model, x))
    F.cross_entropy(model.train()(x), labels).backward()
    optimizer.step()
    assert torch.isfinite(evaluated(model, x)).all()
    return graph


FAST = set(SMALL) - {
    "densenet121",
    "inception_v3",
    "mnasnet0_5",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnet50",
    "resnext50_32x4d",
}


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CNNS])
def test_growth_keeps_the_function_of_torchvisions_networks(name: str) -> None:
    torch.manual_seed(1)
    size = image_size(name)
    graph = check_growth(network(name), torch.randn(2, 3, size, size, dtype=torch.double))
    assert graph.layer_places or name.startswith(("efficientnet", "convnext", "mobilenet_v3"))  # not after ReLUs
    assert graph.stage_ends or name.startswith(("densenet", "squeezenet", "convnext")), "a place for a block"


@pytest.mark.parametrize("name", OWN)
def test_growth_keeps_the_function_of_our_networks(name: str) -> None:
    graph = check_growth(OWN[name](), torch.randn(2, 3, 32, 32, dtype=torch.double))
    assert graph.layer_places
    assert len(graph.stage_ends) >= 3


@pytest.mark.parametrize("shape", SHAPES)
def test_growth_keeps_the_function_of_resnets(shape: str) -> None:
    model = build(2, **SHAPES[shape])
    graph = check_growth(model, INPUT)
    assert [end.path for end in graph.stage_ends] == ["stages.0.3", "stages.1.3", "stages.2.3"]


def test_in_single_precision_too() -> None:
    model = build(3, width=16).float().eval()
    x = torch.randn(8, 3, 16, 16)
    before = model(x)
    graph = ChannelGraph.trace(model, x)
    widen(graph, 2, noise=0.5)
    graph.insert_layer(graph.layer_places, [x])
    for end in graph.stage_ends:
        graph.insert_block(end.path, [x], start="half_half")
    assert (model(x) - before).abs().max() <= 1e-5 * before.abs().max()


# -- chains ----------------------------------------------------------------------------------------------------

OPERATIONS = ("prune", "widen", "layer", "zero_gamma", "half_half", "remove")
CHAINS = {
    "shape": st.sampled_from([*SHAPES, "vgg", "mobilenet"]),
    "chain": st.lists(st.sampled_from(OPERATIONS), min_size=5, max_size=5),
    "seed": st.integers(0, 2**32),
}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(**CHAINS)
def test_chains_of_operations(shape: str, chain: list[str], seed: int) -> None:
    check_chain(shape, chain, seed)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(**CHAINS)
def test_many_chains_of_operations(shape: str, chain: list[str], seed: int) -> None:
    check_chain(shape, chain, seed)


def check_chain(shape: str, chain: list[str], seed: int) -> None:
    """After each operation the network computes what it did before; pruned, what the masked one does."""
    torch.manual_seed(seed)
    if shape in SHAPES:
        model, x = build(1, **SHAPES[shape]), INPUT
    else:
        model = VGG(depth=8, width=4) if shape == "vgg" else MobileNet(version=1, width_multiplier=0.1)
        model, x = model.double(), torch.randn(2, 3, 16, 16, dtype=torch.double)
    fresh, optimizer = copy.deepcopy(model), OPTIMIZERS["adam"](model.parameters())
    labels = LABELS[: len(x)]
    for operation in chain:
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        graph = ChannelGraph.trace(model, x[:1])
        before = evaluated(model, x)
        if operation == "prune":
            masked = copy.deepcopy(model)
            keeps = {space.name: random_keep(space.size, least=2) for space in graph.spaces}
            for space in ChannelGraph.trace(masked, x[:1]).spaces:
                mask(space, dropped(space.size, keeps[space.name]))
            before = evaluated(masked, x)
            graph.reindex_spaces({space: keeps[space.name] for space in graph.spaces}, optimizer)
        elif operation == "widen":
            chosen = [space for space in graph.spaces if torch.rand(()) < 0.5]
            widen(graph, 1.5, spaces=chosen, noise=float(torch.rand(())), optimizer=optimizer)
        elif operation == "layer" and graph.layer_places:
            graph.insert_layer(graph.layer_places[seed % len(graph.layer_places)], [x], optimizer=optimizer)
        elif operation in STARTS and graph.stage_ends:
            end = graph.stage_ends[seed % len(graph.stage_ends)]
            graph.insert_block(end.path, [x], start=operation, optimizer=optimizer)
        elif operation == "remove":
            blocks = [b for b in graph.blocks if b.kind == "sum" and graph.can_remove(b)]
            if blocks:
                block = blocks[seed % len(blocks)]
                with torch.no_grad():  # a branch whose last convolution is dead adds what its norm makes of zeros
                    model.get_submodule(block.branch.last).weight.zero_()
                before = evaluated(model, x)
                graph.remove_block(block, optimizer)
        assert_kept(model, x, before, 1e-7)
    rebuilt = rebuild(fresh, json.loads(json.dumps(describe(model))))
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(evaluated(rebuilt, x), evaluated(model, x))
    assert {id(p) for p in model.parameters()} == {id(p) for g in optimizer.param_groups for p in g["params"]}


@pytest.mark.parametrize("again", [False, True], ids=["one graph", "traced again"])
@pytest.mark.parametrize("order", [("branch", "shortcut"), ("shortcut", "branch")])
@pytest.mark.parametrize("shape", ["plain B", "bottleneck B"])
def test_both_operands_of_a_sum_can_go(shape: str, order: tuple[str, str], again: bool) -> None:
    """What is left of a branch is one position for all samples: of two, one has to keep the shape."""
    model = build(1, **SHAPES[shape])
    graph = trace(model)
    graph.insert_layer("stages.1.0.shortcut.0", [INPUT])  # channels of its own make the shortcut a branch
    first = [b for name in order for b in graph.blocks if b.path == f"stages.1.0.{name}"]
    assert len(first) == 2
    with torch.no_grad():
        for block in first:
            model.get_submodule(block.branch.last).weight.zero_()
    before = outputs(model)
    for block in first:
        if again:
            graph = trace(model)
        (found,) = (b for b in graph.blocks if b.path == block.path)
        graph.remove_block(found)
    for a, b in zip(outputs(model), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# -- widening ---------------------------------------------------------------------------------------------------


def test_a_space_becomes_much_wider_in_no_time() -> None:
    start = time.perf_counter()
    assert len(_copies(1, 20_000, None)) == 20_000
    assert time.perf_counter() - start < 5  # adding up what there is before each of 20000 copies takes half a minute


def test_copies_part_only_if_they_share_unevenly() -> None:
    """Two copies that are used equally stay copies after every step: only the cost has grown."""

    def trained(noise: float) -> torch.Tensor:
        torch.manual_seed(0)
        model = build(1)
        graph = trace(model)
        space = graph.spaces[1]
        widen(graph, target={space.name: 2 * space.size}, noise=noise)
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        for _ in range(5):
            step(model.train(), optimizer)
        (axis,) = (slot.axis for slot in space.slots if slot.role == "produces")
        rows = axis.weight.detach().flatten(1)
        return torch.pdist(rows / rows.norm(dim=1, keepdim=True)).min()

    assert trained(0.0) < 1e-10
    assert trained(0.5) > 1e-4


def test_new_channels_copy_each_old_one_before_any_twice() -> None:
    model = build(1, width=8)
    graph = trace(model)
    space = graph.spaces[1]
    (axis,) = (slot.axis for slot in space.slots if slot.role == "produces")
    old = axis.weight.detach().clone()
    assert widen(graph, target={space.name: 20}) == {space.name: (8, 20)}
    new = axis.weight.detach()
    assert torch.equal(new[:8], old)
    sources = [int((row == old).flatten(1).all(1).nonzero()) for row in new[8:]]
    assert sorted(sources[:8]) == list(range(8))


def test_what_cannot_be_widened_is_refused_before_anything_changes() -> None:
    model = build(1)
    graph = trace(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MorphError, match=r"a factor of 0\.5 does not widen"):
        widen(graph, 0.5)
    with pytest.raises(MorphError, match="already has 4 channels, 3 would not be wider"):
        widen(graph, target={graph.spaces[1].name: 8, graph.spaces[0].name: 3})
    with pytest.raises(KeyError, match="no channel space 'nowhere'"):
        widen(graph, target={"nowhere": 8})
    with pytest.raises(MorphError, match="either a factor or a target"):
        widen(graph)
    with pytest.raises(MorphError, match=r"already costs .*, more than the target"):
        expand_to(graph, WidthCost(graph, "flops"), 10.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# -- depth -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["layer", *STARTS])
def test_the_training_loss_stays_too(how: str) -> None:
    """A new norm after an identity convolution renormalises: the loss would leap (the thesis: 80 to below 30 %)."""
    torch.manual_seed(0)
    model = build(2, width=8).train()
    x, labels = torch.randn(64, 3, 16, 16, dtype=torch.double), torch.randint(10, (64,))
    graph = ChannelGraph.trace(model, x[:1])
    halves = [x[:32], x[32:]]

    def loss() -> float:
        with torch.no_grad():
            return sum(
                F.cross_entropy(model(half), part).item() for half, part in zip(halves, labels.split(32), strict=True)
            )

    before = loss()
    if how == "layer":
        graph.insert_layer(graph.layer_places, halves)
    else:
        for end in graph.stage_ends:
            graph.insert_block(end.path, halves, start=how)
    after = loss()
    assert abs(after - before) <= (1e-9 if how == "zero_gamma" else 0.01) * before
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    assert abs(loss() - before) > 0.01 * before, "the check would not notice"


def test_measuring_leaves_no_trace() -> None:
    model = build(1).train()
    model.stem.eval()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.random.get_rng_state()
    statistics = measure_inputs(model, ["stages.0.0.branch.3"], [INPUT[:2], INPUT[2:]])["stages.0.0.branch.3"]
    assert statistics.mean.shape == statistics.var.shape == (4,)
    assert all(torch.equal(dict(model.named_buffers())[name], b) for name, b in buffers.items())
    assert not model.stem.training and model.stages.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


class Leaky(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 5, 1)
        self.act = nn.LeakyReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.a(x))
        return self.c(self.b(self.b(x).relu())).mean((2, 3))


def test_what_cannot_become_deeper_is_refused_before_anything_changes() -> None:
    model = Leaky()
    graph = ChannelGraph.trace(model, torch.randn(1, 3, 8, 8))
    before = str(model)
    for path, reason in {
        "b": "used several times",
        "c": "may be negative",
        "act": "not a two-dimensional convolution",
        "nowhere": "not a two-dimensional convolution",
    }.items():
        with pytest.raises(MorphError, match=rf"no layer can be put in front of '{path}'.*{reason}"):
            graph.insert_layer(path)
    with pytest.raises(MorphError, match="no block can be put after 'b'"):
        graph.insert_block("b")
    with pytest.raises(MorphError, match=r"half_half block with 4 inner channels .* after 'act': an identity needs 8"):
        graph.insert_block("act", start="half_half", inner=4)
    resnet = trace(build(1))
    with pytest.raises(MorphError, match="a kernel of 2 has no middle"):
        resnet.insert_layer(resnet.layer_places, [INPUT], kernel=2)
    with pytest.raises(MorphError, match=r"calibration: .* need a batch"):
        resnet.insert_layer(resnet.layer_places)
    assert str(model) == before
    assert str(resnet.model) == str(build(1))


@pytest.mark.parametrize("kernels", [(3,), (3, 3), (1, 3, 5, 1)])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("start", STARTS)
def test_a_block_after_values_that_may_be_negative_ends_without_relu(
    start: Start, normed: bool, kernels: tuple[int, ...]
) -> None:
    """In training mode too: all norms of an identity start with the statistics of what reaches them."""
    torch.manual_seed(0)
    model = Leaky().double()
    if normed:
        model.a = nn.Sequential(model.a, nn.BatchNorm2d(4).double())
    x = torch.randn(2, 3, 8, 8, dtype=torch.double)
    before = outputs(model, (x,))
    graph = ChannelGraph.trace(model, x)
    path = graph.insert_block("act", [x], kernels=kernels, start=start)
    assert_close(outputs(model, (x,)), before, 1e-10)
    block = model.get_submodule(path)
    assert isinstance(block.activation, nn.Identity)
    assert block.branch[0].out_channels == (8 if start == "half_half" and len(kernels) > 1 else 4)
    assert ("BatchNorm2d" in str(block)) == normed


def test_new_parameters_join_the_group_of_their_kind() -> None:
    model = build(1)
    weights = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": weights, "weight_decay": 1e-3}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    graph = trace(model)
    graph.insert_layer(graph.layer_places[2], [INPUT], optimizer=optimizer)
    graph.insert_block("stages.1.0", [INPUT], start="half_half", optimizer=optimizer)
    for group, is_weight in zip(optimizer.param_groups, (True, False), strict=True):
        expected = [p for p in model.parameters() if (p.dim() > 1) == is_weight]
        assert list(map(id, group["params"])) == list(map(id, expected)), "in the order of a new optimizer"


def test_an_inserted_branch_can_be_pruned_and_removed() -> None:
    model = build(1).train()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    graph = trace(model)
    path = graph.insert_block("stages.0.0", [INPUT], start="half_half", optimizer=optimizer)
    step(model, optimizer)
    (block,) = (b for b in graph.blocks if b.path.startswith(path))
    with torch.no_grad():
        model.get_submodule(block.branch.last).weight.zero_()
    before = outputs(model)
    graph.remove_block(block, optimizer)
    for a, b in zip(outputs(model), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    rebuilt = rebuild(build(1), json.loads(json.dumps(describe(model))))
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(evaluated(rebuilt, INPUT), evaluated(model, INPUT))


@pytest.mark.parametrize("shape", ["plain A", "plain B", "bottleneck B"])
def test_where_a_block_is_gone_nothing_is_inserted(shape: str) -> None:
    graph = trace(build(blocks=2, **SHAPES[shape]))
    before = list(graph.layer_places)
    block = graph.blocks[0]
    graph.remove_block(block)
    assert len(graph.layer_places) < len(before)
    assert set(graph.layer_places) == set(trace(graph.model).layer_places)
    assert [end.path for end in graph.stage_ends] == [end.path for end in trace(graph.model).stage_ends]
    for path in [*graph.layer_places]:
        graph.insert_layer(path, [INPUT])


def test_every_stage_of_a_network_without_sums_gets_a_block() -> None:
    """The first block makes a sum, and with it other stages: what was their end before is none any more."""
    torch.manual_seed(0)
    model = VGG(depth=8, width=4).double().eval()
    graph = ChannelGraph.trace(model, INPUT)
    images, before = torch.randn(2, *INPUT.shape[1:]).double(), len(graph.stage_ends)
    wanted = model(images)
    inserted = [insert_block_like(graph, end.path, [images], "zero_gamma") for end in list(graph.stage_ends)]
    assert len(inserted) == before > 1
    torch.testing.assert_close(model(images), wanted, rtol=0, atol=1e-12)
