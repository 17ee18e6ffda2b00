"""What the tests of channel surgery share: networks, and the masked network that a sliced one has to equal."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer

from morphtrain.model import ResNet
from morphtrain.morph import ChannelGraph, Space, describe
from morphtrain.morph.effective import effective, parameters_of, scale

PRESETS = {"resnet8": 1, "resnet20": 3, "resnet32": 5, "resnet56": 9}
SHAPES = {
    "plain A": {"shortcut": "A"},
    "plain B": {"shortcut": "B"},
    "bottleneck A": {"shortcut": "A", "bottleneck": True, "layers": 3},
    "bottleneck B": {"shortcut": "B", "bottleneck": True, "layers": 3},
}
OPTIMIZERS = {
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: Adam(p, lr=0.01),
    "adamw": lambda p: AdamW(p, lr=0.01, amsgrad=True),
}

INPUT = torch.randn(4, 3, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3])


def build(blocks: int = 1, width: int = 4, **options: object) -> nn.Module:
    """A small network in double precision with norm statistics unlike those of a new one."""
    model = ResNet(blocks=blocks, width=width, **options).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def trace(model: nn.Module) -> ChannelGraph:
    return ChannelGraph.trace(model, INPUT[:1])


def step(model: nn.Module, optimizer: Optimizer) -> None:
    F.cross_entropy(model(INPUT), LABELS).backward()
    optimizer.step()
    optimizer.zero_grad()


def outputs(model: nn.Module, inputs: tuple = (INPUT,)) -> tuple[torch.Tensor, torch.Tensor]:
    """What the network computes in training and in evaluation mode; modes and buffers are put back."""
    buffers = copy.deepcopy(dict(model.named_buffers()))
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad():
        training = together(model.train()(*inputs))
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        evaluation = together(model.eval()(*inputs))
    for module, mode in modes:
        module.training = mode
    return training, evaluation


def together(output: object) -> torch.Tensor:
    """All outputs of a network as one vector a sample."""
    if isinstance(output, torch.Tensor):
        return output.flatten(1)
    return torch.cat([together(part) for part in (output.values() if isinstance(output, dict) else output)], 1)


@torch.no_grad()
def mask(space: Space, dropped: torch.Tensor) -> None:
    """Zero what makes and what uses the `dropped` channels (indices), without changing any shape."""
    for slot in space.slots:
        if not slot.has_weights:
            continue
        entries = (slot.start + dropped[:, None] * slot.segment.span + torch.arange(slot.segment.span)).flatten()
        for name, dim in slot.axis.tensors:
            weight = effective(slot.axis.module, name)
            factor = torch.ones(weight.shape[dim]).index_fill_(0, entries, 0.0)
            scale(slot.axis.module, name, factor.view([-1 if d == dim else 1 for d in range(weight.dim())]))


def twin(model: nn.Module, make_optimizer, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    """A copy of a network and of its optimizer's state."""
    other = copy.deepcopy(model)
    other_optimizer = make_optimizer(other.parameters())
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other, other_optimizer


def random_keep(size: int, least: int = 1) -> torch.Tensor:
    """A random subset of channels, at least `least` if there are that many."""
    count = int(torch.randint(min(least, size), size + 1, ()))
    return torch.randperm(size)[:count].sort().values


def dropped(size: int, keep: torch.Tensor) -> torch.Tensor:
    alive = torch.zeros(size, dtype=torch.bool)
    alive[keep] = True
    return (~alive).nonzero().flatten()


def check_surgery(
    model: nn.Module,
    inputs: tuple,
    tolerance: float,
    ignore: tuple[str, ...] = (),
    spaces: bool | None = True,
    momentum: float = 0.9,
) -> ChannelGraph:
    """Cut random channels of every space and put copies in their place; nothing but the widths may change.

    The sliced network has to equal the masked one, and the widened one the sliced one, in both modes, to `tolerance`
    of the largest output; mode, requires_grad, dtype, memory format and optimizer groups survive; a step runs.
    """
    model = model.train().double().to(memory_format=torch.channels_last)
    first = next(m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.Conv1d)))
    for parameter in parameters_of(first):
        parameter.requires_grad_(False)
    next(m for m in model.modules() if not list(m.children())).eval()
    optimizer = two_groups(model, momentum)
    together(model(*inputs)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    masked = copy.deepcopy(model)
    before = facts(model, optimizer)
    graph = ChannelGraph.trace(model, inputs, ignore=ignore)
    masked_graph = ChannelGraph.trace(masked, inputs, ignore=ignore)
    assert spaces is None or bool(graph.spaces) == spaces
    assert facts(model, optimizer) == before, "tracing left a mark"
    sizes = {space.name: space.size for space in graph.spaces}
    # With a single channel left, a new trace cannot tell whether several entries of it are neighbours.
    keeps = {space.name: random_keep(space.size, least=2) for space in graph.spaces}
    for space in masked_graph.spaces:
        mask(space, dropped(space.size, keeps[space.name]))
    graph.reindex_spaces({space: keeps[space.name] for space in graph.spaces}, optimizer)
    sliced = outputs(model, inputs)
    assert_close(sliced, outputs(masked, inputs), tolerance)
    again = ChannelGraph.trace(model, inputs, ignore=ignore)
    if not any(space.is_ambiguous for space in graph.spaces):
        assert [(s.name, s.size) for s in again.spaces] == [(s.name, s.size) for s in graph.spaces]
    for space in list(graph.spaces):
        if not space.is_ambiguous:
            extra = torch.randint(space.size, (sizes[space.name] - space.size,))
            graph.reindex(space, torch.cat([torch.arange(space.size), extra]), optimizer)
            assert space.size == sizes[space.name]
    assert_close(outputs(model, inputs), sliced, tolerance)
    if not any(space.is_ambiguous for space in graph.spaces):
        after = facts(model, optimizer)
        assert {k: (v, after[k]) for k, v in before.items() if after[k] != v} == {}
    together(model(*inputs)).square().mean().backward()
    optimizer.step()
    return graph


def two_groups(model: nn.Module, momentum: float) -> Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() > 1], "weight_decay": 1e-4}]
    groups.append({"params": [p for p in trained if p.dim() <= 1]})
    return SGD([group for group in groups if group["params"]], lr=1e-3, momentum=momentum)


def facts(model: nn.Module, optimizer: Optimizer) -> dict[str, object]:
    """Everything about a network's tensors except their values."""
    groups = {id(p): n for n, group in enumerate(optimizer.param_groups) for p in group["params"]}
    result: dict[str, object] = {path: module.training for path, module in model.named_modules()}
    for name, p in model.named_parameters():
        moment = optimizer.state.get(p, {}).get("momentum_buffer")
        shape = None if moment is None else moment.shape
        last = p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last)
        result[name] = (p.shape, p.dtype, p.requires_grad, last, groups.get(id(p)), shape)
    result["widths"] = describe(model)["widths"]
    result["state"] = len(optimizer.state)
    return result


def assert_close(actual: tuple, expected: tuple, tolerance: float) -> None:
    for mode, a, b in zip(("training", "evaluation"), actual, expected, strict=True):
        assert torch.isfinite(b).all(), mode
        assert b.abs().max() > 0, mode
        error = float((a - b).abs().max() / b.abs().max())
        assert error <= tolerance, f"{mode}: {error}"


def chain(producer_alive: set[int], consumer_alive: set[int]) -> nn.Sequential:
    """Two convolutions around a space of 8, alive only where the sets say."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(256, 4)).double()
    with torch.no_grad():
        for channel in range(8):
            if channel not in producer_alive:
                model[0].weight[channel] = 1e-6
                model[0].bias[channel] = 0
            if channel not in consumer_alive:
                model[2].weight[:, channel] = -1e-6  # magnitude counts, not sign
    return model
