"""A sliced network equals the masked one; a widened network equals the narrow one; the next step agrees."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import (
    INPUT,
    LABELS,
    OPTIMIZERS,
    PRESETS,
    SHAPES,
    build,
    dropped,
    mask,
    outputs,
    random_keep,
    step,
    trace,
    twin,
)
from torch import nn
from torch.nn import functional as F

from morphtrain.morph import ChannelGraph, MorphError


def surviving(original: ChannelGraph, keeps: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of the masked network, cut to the kept channels by a route of its own: boolean indexing."""
    masks: dict[tuple[int, str], list[tuple[int, torch.Tensor]]] = {}
    for axis in original.axes:
        kept = []
        for segment in axis.segments:
            alive = torch.ones(segment.length, dtype=torch.bool)
            if segment.space and segment.space.name in keeps:
                alive[:] = False
                for i in keeps[segment.space.name].tolist():
                    alive[i * segment.span : (i + 1) * segment.span] = True
            kept.append(alive)
        for name, dim in axis.tensors:
            masks.setdefault((id(axis.module), name), []).append((dim, torch.cat(kept)))
    result = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = parameter.detach()
            for dim, alive in masks.get((id(module), name), []):
                value = value.transpose(0, dim)[alive].transpose(0, dim)
            result[f"{path}.{name}"] = value
    return result


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("trial", range(2))
def test_sliced_equals_masked_and_so_does_the_next_step(preset: str, shape: str, trial: int) -> None:
    torch.manual_seed(trial)
    make = OPTIMIZERS[list(OPTIMIZERS)[trial % 3]]
    sliced = build(PRESETS[preset], **SHAPES[shape]).train()
    optimizer = make(sliced.parameters())
    step(sliced, optimizer)
    step(sliced, optimizer)
    masked, masked_optimizer = twin(sliced, make, optimizer)
    graph, masked_graph = trace(sliced), trace(masked)
    keeps = {space.name: random_keep(space.size) for space in graph.spaces}
    for space, masked_space in zip(list(graph.spaces), masked_graph.spaces, strict=True):
        keep = keeps[space.name]
        mask(masked_space, dropped(space.size, keep))
        graph.reindex(space, keep, optimizer=optimizer)
    for a, b in zip(outputs(sliced), outputs(masked), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    step(sliced, optimizer)
    step(masked, masked_optimizer)
    expected = surviving(masked_graph, keeps, masked)
    for name, parameter in sliced.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-7, atol=1e-9, msg=name)


@st.composite
def resnets(draw: st.DrawFn) -> dict[str, object]:
    """Options of any ResNet that can be built."""
    bottleneck = draw(st.booleans())
    stages = draw(st.integers(1, 3))
    return {
        "stages": stages,
        "blocks": draw(st.lists(st.integers(1, 2), min_size=stages, max_size=stages)),
        "layers": draw(st.integers(3 if bottleneck else 1, 4)),
        "bottleneck": bottleneck,
        "width": draw(st.integers(1, 7)),
        "downsample": draw(st.booleans()),
        "shortcut": draw(st.sampled_from("AB")),
    }


@settings(max_examples=30, deadline=None, derandomize=True)
@given(options=resnets(), seed=st.integers(0, 2**32), widen=st.booleans())
def test_any_resnet_can_be_cut_and_widened(options: dict[str, object], seed: int, widen: bool) -> None:
    torch.manual_seed(seed)
    sliced = build(**options)
    masked = copy.deepcopy(sliced)
    graph, masked_graph = trace(sliced), trace(masked)
    for space, masked_space in zip(list(graph.spaces), masked_graph.spaces, strict=True):
        keep = random_keep(space.size)
        mask(masked_space, dropped(space.size, keep))
        graph.reindex(space, keep)
    if widen:
        for space in list(graph.spaces):
            extra = torch.randint(space.size, (int(torch.randint(3, ())),))
            graph.reindex(space, torch.cat([torch.arange(space.size), extra]))
    for a, b in zip(outputs(sliced), outputs(masked), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    again = trace(sliced)
    assert [(s.name, s.size) for s in again.spaces] == [(s.name, s.size) for s in graph.spaces]
    step(sliced.train(), OPTIMIZERS["sgd"](sliced.parameters()))


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_space_alone(shape: str, make) -> None:
    model = build(2, **SHAPES[shape]).train()
    optimizer = make(model.parameters())
    step(model, optimizer)
    for number in range(len(trace(model).spaces)):
        sliced, sliced_optimizer = twin(model, make, optimizer)
        masked, masked_optimizer = twin(model, make, optimizer)
        graph, masked_graph = trace(sliced), trace(masked)
        space, masked_space = graph.spaces[number], masked_graph.spaces[number]
        keep = random_keep(space.size)
        mask(masked_space, dropped(space.size, keep))
        graph.reindex(space, keep, sliced_optimizer)
        for a, b in zip(outputs(sliced), outputs(masked), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        step(sliced, sliced_optimizer)
        step(masked, masked_optimizer)
        expected = surviving(masked_graph, {space.name: keep}, masked)
        for name, parameter in sliced.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("blocks", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_single_precision(shape: str, blocks: int) -> None:
    sliced = build(blocks, width=16, **SHAPES[shape]).float()
    masked = copy.deepcopy(sliced)
    x = torch.randn(8, 3, 16, 16)
    graph, masked_graph = ChannelGraph.trace(sliced, x), ChannelGraph.trace(masked, x)
    for space, masked_space in zip(list(graph.spaces), masked_graph.spaces, strict=True):
        keep = random_keep(space.size)
        mask(masked_space, dropped(space.size, keep))
        graph.reindex(space, keep)
    for mode in (True, False):
        a, b = sliced.train(mode)(x), masked.train(mode)(x)
        assert (a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("blocks", [1, 3])
def test_repeated_channels_keep_the_function(shape: str, blocks: int) -> None:
    model = build(blocks, **SHAPES[shape]).train()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    step(model, optimizer)
    before = outputs(model)
    graph = trace(model)
    for space in list(graph.spaces):
        extra = torch.randint(space.size, (int(torch.randint(1, 5, ())),))
        graph.reindex(space, torch.cat([torch.arange(space.size), extra]), optimizer)
    for a, b in zip(outputs(model), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    # The momentum follows: continuing with it alone moves the wide network as it would have moved the narrow one.
    step(model, optimizer)


def test_momentum_of_a_widened_network_moves_the_function_equally() -> None:
    narrow = build(1).train()
    optimizer = OPTIMIZERS["sgd"](narrow.parameters())
    step(narrow, optimizer)
    wide, wide_optimizer = twin(narrow, OPTIMIZERS["sgd"], optimizer)
    graph = trace(wide)
    graph.reindex(graph.spaces[1], [0, 1, 2, 3, 1, 1], wide_optimizer)
    with torch.no_grad():
        for model, opt in ((narrow, optimizer), (wide, wide_optimizer)):
            for parameter in model.parameters():
                parameter.sub_(0.05 * opt.state[parameter]["momentum_buffer"])
    for a, b in zip(outputs(wide), outputs(narrow), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_permuting_and_back_changes_nothing() -> None:
    model = build(2)
    before = copy.deepcopy(model.state_dict())
    graph = trace(model)
    for space in graph.spaces:
        order = torch.randperm(space.size)
        graph.reindex(space, order)
        graph.reindex(space, order.argsort())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_row_j_is_row_index_j() -> None:
    model = build(1)
    graph = trace(model)
    space = graph.spaces[1]
    (producer,) = [slot.axis.module for slot in space.slots if slot.role == "produces"]
    before = producer.weight.detach().clone()
    graph.reindex(space, [2, 0])
    assert torch.equal(producer.weight.detach(), before[[2, 0]])
    assert space.size == 2
    assert producer.out_channels == 2


@pytest.mark.parametrize("shape", SHAPES)
def test_removed_block_equals_the_block_with_an_empty_space(shape: str) -> None:
    model = build(3, **SHAPES[shape]).train()
    make = OPTIMIZERS["sgd"]
    optimizer = make(model.parameters())
    step(model, optimizer)
    for number in range(len(trace(model).blocks)):
        sliced, sliced_optimizer = twin(model, make, optimizer)
        masked, masked_optimizer = twin(model, make, optimizer)
        masked_space = trace(masked).blocks[number].spaces[-1]
        mask(masked_space, torch.arange(masked_space.size))
        graph = trace(sliced)
        block = graph.blocks[number]
        graph.remove_block(block, sliced_optimizer)
        for a, b in zip(outputs(sliced), outputs(masked), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        step(sliced, sliced_optimizer)
        step(masked, masked_optimizer)
        masked_state = dict(masked.named_parameters())
        for name, parameter in sliced.named_parameters():
            original = name.replace(f"{block.path}.norm", block.branch.norm)
            torch.testing.assert_close(parameter, masked_state[original], rtol=1e-7, atol=1e-9, msg=name)
        assert len(sliced_optimizer.param_groups[0]["params"]) == len(list(sliced.parameters()))
        # Spaces that went through the removed block can still be changed.
        for space in list(graph.spaces):
            graph.reindex(space, range(max(1, space.size // 2)), sliced_optimizer)
        step(sliced, sliced_optimizer)


def test_everything_else_survives() -> None:
    model = build(2).float().to(memory_format=torch.channels_last).train()
    frozen = model.stages[0][0].branch[0].weight
    frozen.requires_grad_(False)
    model.stages[1].eval()
    decaying = [p for p in model.parameters() if p.dim() > 1 and p.requires_grad]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.SGD([{"params": decaying, "weight_decay": 1e-4}, {"params": plain}], lr=0.1, momentum=0.9)
    x = INPUT.float().to(memory_format=torch.channels_last)
    F.cross_entropy(model(x), LABELS).backward()
    optimizer.step()
    modes = {path: m.training for path, m in model.named_modules()}
    graph = ChannelGraph.trace(model, x)
    assert {path: m.training for path, m in model.named_modules()} == modes
    for space in list(graph.spaces):
        graph.reindex(space, range(space.size - 1), optimizer)
    assert {path: m.training for path, m in model.named_modules()} == modes
    assert not model.stages[0][0].branch[0].weight.requires_grad
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels)
        if isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.running_var)
    weights, vectors = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert id(parameter) in (weights if parameter.dim() > 1 else vectors)
            assert optimizer.state[parameter]["momentum_buffer"].shape == parameter.shape
    assert len(optimizer.state) == len(weights) + len(vectors)
    F.cross_entropy(model(x), LABELS).backward()
    optimizer.step()


def test_tracing_leaves_no_mark() -> None:
    model = build(1).train()
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    trace(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert model.training


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([0, 9], "must lie in 0..3"),
        ([[0]], "one-dimensional"),
        ([-1], "must lie in"),
        ([], "no channel left"),
        ([True, False, True, True], "must hold positions"),
        ([0.5], "must hold positions"),
    ],
)
def test_a_wrong_index_is_refused_before_anything_changes(index: list, message: str) -> None:
    model = build(1)
    before = copy.deepcopy(model.state_dict())
    graph = trace(model)
    with pytest.raises(MorphError, match=message):
        graph.reindex(graph.spaces[0], index)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


class Hostile(nn.Module):
    """A network with an operation that mixes channels in a way nobody can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        self.mixer = Mixer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mixer(self.inner(x))


class Mixer(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.renorm(x, 2, 1, 1.0)  # the line the message must name


def test_an_unsupported_operation_is_named_with_path_and_line() -> None:
    with pytest.raises(MorphError) as caught:
        ChannelGraph.trace(Hostile(), INPUT[:1].float())
    message = str(caught.value)
    assert "'renorm'" in message
    assert "mixer" in message
    assert "test_reindex.py" in message
    line = next(n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "must name" in text)
    assert f"line {line}" in message


def test_a_flattened_space_spans_features() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 5)
    ).double()
    masked = copy.deepcopy(model)
    graph, masked_graph = trace(model), trace(masked)
    assert [space.size for space in graph.spaces] == [6]
    mask(masked_graph.spaces[0], torch.tensor([1, 4]))
    graph.reindex(graph.spaces[0], [0, 2, 3, 5])
    assert model[5].in_features == 64
    for a, b in zip(outputs(model), outputs(masked), strict=True):
        torch.testing.assert_close(a, b)


def test_concatenation_and_depthwise() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 1)
            self.b = nn.Conv2d(3, 6, 1)
            self.depthwise = nn.Conv2d(10, 10, 3, padding=1, groups=10)
            self.out = nn.Conv2d(10, 5, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.cat([self.a(x), self.b(x)], dim=1)
            return self.out(torch.relu(self.depthwise(x))).mean((2, 3))

    model = Net().double()
    masked = copy.deepcopy(model)
    graph, masked_graph = trace(model), trace(masked)
    assert sorted(space.size for space in graph.spaces) == [4, 6]
    for space, masked_space in zip(graph.spaces, masked_graph.spaces, strict=True):
        mask(masked_space, torch.tensor([0, 2]))
        graph.reindex(space, [i for i in range(space.size) if i not in (0, 2)])
    assert model.depthwise.groups == 6
    for a, b in zip(outputs(model), outputs(masked), strict=True):
        torch.testing.assert_close(a, b)
    before = outputs(model)
    graph.reindex(graph.spaces[0], [0, 1, 1, 0, 0])
    for a, b in zip(outputs(model), before, strict=True):
        torch.testing.assert_close(a, b)


def test_a_space_may_stand_twice_in_an_axis() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 1)
            self.b = nn.Conv2d(3, 2, 1)
            self.out = nn.Conv2d(10, 5, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = self.a(x), self.b(x)
            return self.out(torch.cat([a, b, a], dim=1)).mean((2, 3))

    model = Net().double()
    masked = copy.deepcopy(model)
    graph, masked_graph = trace(model), trace(masked)
    space, masked_space = graph.space("a"), masked_graph.space("a")
    assert space.size == 4
    mask(masked_space, torch.tensor([1]))
    graph.reindex(space, [0, 2, 3])
    assert model.out.in_channels == 8
    for a, b in zip(outputs(model), outputs(masked), strict=True):
        torch.testing.assert_close(a, b)
    graph.reindex(space, [0, 1, 2, 2, 0])
    for a, b in zip(outputs(model), outputs(masked), strict=True):
        torch.testing.assert_close(a, b)


def test_the_graph_of_a_copy_changes_the_copy() -> None:
    """Two modules hold one weight: in the copy they share one as well, and it follows."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1))
    model[3].weight = model[1].weight
    graph = ChannelGraph.trace(model, torch.zeros(1, 3, 4, 4))
    twin = copy.deepcopy(graph)
    twin.reindex_spaces({space: torch.arange(5) for space in twin.spaces})
    assert twin.model[1].weight is twin.model[3].weight
    assert twin.model[1].weight.shape[:2] == (5, 5)
    assert twin.model(torch.zeros(1, 3, 4, 4)).shape == (1, 2, 4, 4)
    assert model[1].weight is model[3].weight
    assert [space.size for space in graph.spaces] == [8] * len(graph.spaces)
    assert model[1].weight.shape[:2] == (8, 8)
