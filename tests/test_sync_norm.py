"""Batch norm over all processes is torch's on the whole batch, which every process computes beside it as the oracle."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import check_surgery
from ranks import in_ranks
from torch import nn

import morphtrain
from morphtrain import schema, world
from morphtrain.cost import estimate_memory
from morphtrain.errors import UserError
from morphtrain.model import ResNet
from morphtrain.morph import ChannelGraph
from morphtrain.norm import sync
from morphtrain.norm.sync import SyncBatchNorm1d, SyncBatchNorm2d, Synchronised, to_sync
from morphtrain.trainer import checkpoint

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
KINDS = ({"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"bias": False})


def network(**options: Any) -> nn.Sequential:
    """Convolution, norm, ReLU, twice, and a norm of vectors: 1-D and 2-D, one after the other."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, **options), nn.ReLU()),
        *(nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5, **options), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.BatchNorm1d(5, **options), nn.Linear(5, 4)),
    )
    for norm in norms(model):
        for tensor in (norm.weight, norm.bias):
            if tensor is not None:
                nn.init.uniform_(tensor, 0.5, 1.5)
    return model.double()


def norms(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def parts(images: int, step: int) -> slice:
    """This process's images of a batch of so many: uneven parts, and every fifth step rank 1 has none."""
    size, rank = world.size(), world.rank()
    weights = [1 + 2 * other for other in range(size)]
    if step % 5 == 0:
        weights[1] = 0
    ends = [round(images * sum(weights[:count]) / sum(weights)) for count in range(size + 1)]
    return slice(ends[rank], ends[rank + 1])


def largest_errors(steps: int, memory_format: str, options: dict[str, Any]) -> dict[str, float]:
    """Of steps of SGD on batches of 7 to 12 images: by what is compared, relative to the largest value of each."""
    whole = network(**options).to(memory_format=FORMATS[memory_format])
    model = copy.deepcopy(whole)
    assert to_sync(model) == 3
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (whole, model)]
    errors: dict[str, float] = {}

    def compare(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
        if expected.numel():
            error = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
            errors[name] = max(errors.get(name, 0.0), error.item())

    for step in range(steps):
        draw = torch.Generator().manual_seed(step)
        x = (1 + 2 * torch.randn(7 + step % 6, 3, 8, 8, generator=draw)).double()
        x = x.to(memory_format=FORMATS[memory_format])
        target = torch.randn(len(x), 4, generator=draw).double()
        mine = parts(len(x), step)
        images = [x.clone().requires_grad_(), x[mine].clone().requires_grad_()]
        outputs = [m(image) for m, image in zip((whole, model), images, strict=True)]
        compare("outputs", outputs[1], outputs[0][mine])
        for output, goal in zip(outputs, (target, target[mine]), strict=True):
            ((output - goal).square().sum() / len(x)).backward()
        compare("gradients of inputs", images[1].grad, images[0].grad[mine])
        world.sum_([parameter.grad for parameter in model.parameters()])
        for (name, found), expected in zip(model.named_parameters(), whole.parameters(), strict=True):
            compare(f"gradient of {name}", found.grad, expected.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for (name, found), expected in zip(model.named_buffers(), whole.buffers(), strict=True):
            compare(name, found.double(), expected.double())
    for name, found in model.named_parameters():
        compare(f"trained {name}", found, whole.get_parameter(name))
    compare("evaluated", model.eval()(x), whole.eval()(x))
    return errors


def all_kinds(steps: int) -> list[dict[str, float]]:
    found = [largest_errors(6, "NCHW", options) for options in KINDS]
    return [*found, largest_errors(steps, "channels_last", {})]


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_steps_of_processes_are_those_of_one_with_the_whole_batch(size: int) -> None:
    """Sixty in double precision: outputs, gradients of inputs and weights, running statistics, the trained network."""
    steps = 60 if size == 2 else 20
    for errors in [errors for of_rank in in_ranks(size, all_kinds, steps) for errors in of_rank]:
        assert len(errors) > 10
        assert {name: error for name, error in errors.items() if not error <= 1e-8} == {}


def odds_and_ends() -> dict[str, Any]:
    """What two processes see of a norm besides what they train."""
    rank, found = world.rank(), {}
    for dtype in (torch.bfloat16, torch.float16):
        draw = torch.Generator().manual_seed(1)
        x = (5 + torch.randn(20, 4, 6, 6, generator=draw)).to(dtype).to(memory_format=torch.channels_last)
        plain, norm = nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4))
        to_sync(norm)
        own = slice(0, 14) if rank == 0 else slice(14, 20)
        mine = x[own].clone(memory_format=torch.preserve_format).requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            y = norm(mine)
        leaf = x.detach().double().requires_grad_()
        exact = plain.double()(leaf)
        (grad,) = torch.autograd.grad(y.float().square().sum(), mine)
        everyone = torch.cat([part[: 14 if other == 0 else 6] for other, part in enumerate(padded(y.detach()))])
        (true,) = torch.autograd.grad((exact * 2 * everyone).sum(), leaf)
        assert y.dtype is grad.dtype is dtype
        assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (y, grad))
        found[f"{dtype} output"] = error(y, exact[own]) / torch.finfo(dtype).eps
        found[f"{dtype} gradient"] = error(grad, true[own]) / torch.finfo(dtype).eps
        assert norm[0].running_var.dtype is torch.float32
        torch.testing.assert_close(norm[0].running_var, plain.running_var.float(), rtol=1e-5, atol=1e-6)
    norm = SyncBatchNorm1d(3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(torch.zeros(1 - rank, 3))
    norm(torch.zeros(1, 3))  # of each process one
    with pytest.raises(ValueError, match="expected 2D or 3D"):
        norm(torch.zeros(2, 3, 1, 1))
    x = torch.randn(4, 3)
    with world.alone():
        if rank == 0:  # the other one does not take part
            torch.testing.assert_close(norm(x), nn.BatchNorm1d(3)(x))
    model = ResNet(blocks=1, width=4)
    to_sync(model)
    if rank == 0:
        needed = [estimate_memory(m, (3, 8, 8), 8) for m in (model, ResNet(blocks=1, width=4))]
        found["memory"] = needed[0] - needed[1]
    return found


def padded(y: torch.Tensor) -> torch.Tensor:
    """What all processes have of a batch of at most 14 images, with zeros for those they have not: (size, 14, ...)."""
    full = y.new_zeros(14, *y.shape[1:])
    full[: len(y)] = y
    return world.stacked(full.double())


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected) / expected.abs().clamp(min=1)).abs().max().item()


def test_sixteen_bits_are_rounded_once_and_a_norm_alone_waits_for_nobody() -> None:
    for found in in_ranks(2, odds_and_ends):
        assert found.pop("memory", 0) == 0
        assert len(found) == 4 and max(found.values()) <= 4, found


def test_to_sync_keeps_everything_else() -> None:
    """As ghost norm: parameters, buffers, modes and hooks; checkpoints of either go to the other."""
    model = nn.ModuleList([ResNet(blocks=1, width=4), nn.BatchNorm1d(2), nn.BatchNorm3d(2), nn.BatchNorm2d(3)])
    model[3].eval().weight.requires_grad_(False)
    plain, calls = copy.deepcopy(model), []
    model[3].register_forward_hook(lambda *_: calls.append(1))
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert to_sync(model) == to_sync(model) == len(norms(model)) == 10
    assert all(isinstance(norm, Synchronised) for norm in norms(model))
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert before.keys() == after.keys() and all(before[key] is after[key] for key in before)
    assert not model[3].training and not model[3].weight.requires_grad
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(model[3](x), plain[3](x)) and calls == [1]
    model.load_state_dict(plain.state_dict())
    plain.load_state_dict(model.state_dict())


def test_channels_are_cut_and_copied_under_it() -> None:
    model = ResNet(blocks=1, width=4, shortcut="B")
    plain = [(s.name, s.size) for s in ChannelGraph.trace(model, torch.zeros(1, 3, 8, 8)).spaces]
    to_sync(model)
    graph = check_surgery(model, (torch.randn(7, 3, 8, 8, dtype=torch.double),), 1e-9)
    assert [(s.name, s.size) for s in graph.spaces] == plain and len(graph.blocks) == 3


def test_in_one_process_it_is_plain_batch_norm_with_a_warning(small_run, caplog, tmp_path: Path) -> None:
    ends = [small_run(f"norm={norm}") for norm in ("batch", "sync")]
    batch, synchronised = ends
    assert {type(m) for m in norms(synchronised.model)} == {SyncBatchNorm2d}
    x = torch.randn(8, *batch.data.input_shape)
    assert torch.equal(batch.model.train()(x), synchronised.model.train()(x))
    for name, value in batch.model.state_dict().items():
        assert torch.equal(value, synchronised.model.state_dict()[name]), name
    said = [entry.getMessage() for entry in caplog.records if "norm=sync" in entry.getMessage()]
    assert len(said) == 1 and "in one process it is plain batch norm" in said[0]
    checkpoint.save(synchronised, tmp_path, None)
    loaded = morphtrain.load(tmp_path / "last.pt")
    assert {type(m) for m in norms(loaded)} == {SyncBatchNorm2d}
    batch.model.load_state_dict(loaded.state_dict())


class Derived(nn.BatchNorm2d):
    """A norm whose forward may do anything."""


def test_what_it_cannot_synchronise_is_named() -> None:
    with pytest.raises(UserError, match="norm=sync: the model has no batch norm"):
        sync.build(schema.norm.Norm("sync"), nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"norm=sync: 1 is a Derived, which it cannot synchronise"):
        to_sync(nn.Sequential(nn.BatchNorm2d(2), Derived(2)))
    with pytest.raises(UserError, match=r"norm=sync with model\.batch_norm=false"):
        morphtrain.compose("model=alexnet", "norm=sync")


def compiled() -> float:
    """How far a compiled network is from one that is not, in a training step of two processes."""
    whole = network()
    to_sync(whole)
    model = copy.deepcopy(whole)
    draw = torch.Generator().manual_seed(world.rank())
    x = torch.randn(4 + world.rank(), 3, 8, 8, generator=draw).double()
    outputs = [whole(x), torch.compile(model, backend="eager")(x)]
    for output in outputs:
        output.square().sum().backward()
    pairs = [outputs, *([p.grad, q.grad] for p, q in zip(whole.parameters(), model.parameters(), strict=True))]
    return max((one - other).abs().max().item() for one, other in pairs)


@pytest.mark.slow
def test_compiled_code_leaves_it_out() -> None:
    assert max(in_ranks(2, compiled)) < 1e-12
