"""Ghost batch norm is batch norm on one chunk after the other: the loop is the oracle."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import assert_close, check_surgery, dropped, mask, outputs
from torch import nn

import morphtrain
from morphtrain import schema
from morphtrain.cost import estimate_memory
from morphtrain.errors import UserError
from morphtrain.model import ResNet
from morphtrain.morph import ChannelGraph
from morphtrain.norm import ghost
from morphtrain.norm.ghost import GhostBatchNorm2d, to_ghost
from morphtrain.trainer import checkpoint
from morphtrain.trainer.build import build_run

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def pair(channels: int, size: int, **options) -> tuple[GhostBatchNorm2d, nn.BatchNorm2d]:
    """A ghost norm and a plain one of the same uneven parameters and statistics."""
    plain = nn.BatchNorm2d(channels, **options)
    for tensor in plain.state_dict().values():
        if tensor.dim():
            nn.init.uniform_(tensor, 0.5, 1.5)
    norm = GhostBatchNorm2d(channels, size, **options)
    norm.load_state_dict(plain.state_dict())
    return norm, plain


def sequentially(plain: nn.BatchNorm2d, x: torch.Tensor, size: int) -> torch.Tensor:
    """Batch norm on each chunk in turn; a single value per channel at the end belongs to the chunk before."""
    parts = list(x.split(size))
    if len(parts) > 1 and parts[-1][:, 0].numel() == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return torch.cat([plain(part) for part in parts])


def check_same(
    norm: GhostBatchNorm2d,
    plain: nn.BatchNorm2d,
    x: torch.Tensor,
    tolerance: float = 1e-6,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Two training steps, the loop in `dtype`: outputs, gradients, state; relative to the largest value of each."""
    plain = plain.to(dtype)
    draw = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        ours, theirs = (x.clone().requires_grad_(), x.to(dtype, copy=True).requires_grad_())
        results = []
        for module, leaf in ((norm, ours), (plain, theirs)):
            y = norm(leaf) if module is norm else sequentially(plain, leaf, norm.ghost_batch_size)
            grads = torch.autograd.grad((y * draw + 0.3 * y.square()).sum(), [leaf, *module.parameters()])
            results.append((y, *grads, *module.state_dict().values()))
        for ours, theirs in zip(*results, strict=True):
            assert ours.shape == theirs.shape
            error = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-3)
            assert error <= tolerance, (ours - theirs).abs().max()


@pytest.mark.parametrize("memory_format", FORMATS)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    batch=st.integers(2, 24),
    size=st.integers(1, 9),
    channels=st.integers(1, 5),
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    momentum=st.sampled_from([0.1, 0.7, None]),
    affine=st.booleans(),
)
def test_it_equals_batch_norms_in_sequence(memory_format, batch, size, channels, height, width, momentum, affine):
    x = (2 + 3 * torch.randn(batch, channels, height, width)).double().to(memory_format=FORMATS[memory_format])
    norm, plain = pair(channels, size, momentum=momentum, affine=affine)
    if size * height * width == 1:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            norm(x)
        return
    check_same(norm.double(), plain, x, 1e-9)


@pytest.mark.parametrize("batch", [128, 136, 97, 20])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_it_is_as_exact_in_32_bits_and_keeps_the_memory_format(memory_format: str, batch: int) -> None:
    x = (1 + torch.randn(batch, 16, 8, 8)).to(memory_format=FORMATS[memory_format])
    # Where it is left to torch's kernel it is as exact as that, which is off by more than 1e-6 in single precision.
    torchs_own = batch <= 32 or memory_format == "channels_last"
    check_same(*pair(16, 32), x, 3e-6 if torchs_own else 1e-6)
    norm, plain = pair(16, 32)
    if torchs_own:
        check_same(norm, plain, x, 1e-6, torch.float32)
    y = norm(x.requires_grad_())
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    for tensor in (y, grad):
        assert tensor.is_contiguous(memory_format=FORMATS[memory_format])


def test_one_value_at_the_end_joins_the_chunk_before() -> None:
    norm, plain = pair(3, 4)
    check_same(norm, plain, torch.randn(9, 3, 1, 1))
    assert norm.num_batches_tracked == 4  # two steps of two chunks: 4 and 5 samples
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(torch.randn(1, 3, 1, 1))
    with pytest.raises(ValueError, match="expected 4D"):
        norm(torch.randn(8, 3))


def test_evaluation_and_a_norm_without_statistics() -> None:
    norm, plain = pair(3, 2)
    x = torch.randn(6, 3, 2, 2)
    assert torch.equal(norm.eval()(x), plain.eval()(x))
    bare, plain = pair(3, 2, track_running_stats=False)
    assert torch.equal(bare.eval()(x), plain.eval()(x))
    check_same(bare.train(), plain.train(), x)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_is_rounded_once(dtype: torch.dtype, memory_format: str) -> None:
    norm, plain = pair(4, 8)
    x = (5 + torch.randn(20, 4, 6, 6)).to(dtype).to(memory_format=FORMATS[memory_format])
    with torch.autocast("cpu", dtype=dtype):
        y = norm(x.requires_grad_())
    assert y.dtype is dtype
    exact = sequentially(plain, x.float(), 8)
    torch.testing.assert_close(y.float(), exact, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    torch.testing.assert_close(norm.running_var, plain.running_var, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(y.float().square().sum(), x)
    assert grad.dtype is dtype
    leaf = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad((sequentially(plain.double(), leaf, 8) * 2 * y.detach()).sum(), leaf)
    torch.testing.assert_close(grad.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    assert norm.running_mean.dtype is torch.float32


def test_double_backward_is_refused_and_not_wrong() -> None:
    norm, _ = pair(2, 2)
    x = torch.randn(4, 2, 2, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(norm(x).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_shapes_alone_are_enough() -> None:
    """On the meta device, where memory is estimated."""
    norm = GhostBatchNorm2d(4, 2, device="meta")
    x = torch.empty(5, 4, 3, 3, device="meta", requires_grad=True)
    norm(x).sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("memory_format", FORMATS)
def test_it_takes_little_more_memory_than_batch_norm(memory_format: str) -> None:
    """Simulated, where tensors have no values; under channels_last the gradient comes in the other format."""
    plain = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(512, 2))
    plain.to(memory_format=FORMATS[memory_format])
    norm = copy.deepcopy(plain)
    assert to_ghost(norm, 8) == 1
    least, found = (estimate_memory(model, (3, 8, 8), 64) for model in (plain, norm))
    assert least <= found <= least + 64 * 8 * 8 * 8 * 4 / 2


def test_to_ghost_keeps_everything_else() -> None:
    model = ResNet(blocks=1, width=4).double().to(memory_format=torch.channels_last)
    shared = nn.BatchNorm2d(3)
    holder = nn.ModuleList([model, shared, nn.Sequential(shared), nn.BatchNorm1d(2)])
    shared.eval()
    shared.weight.requires_grad_(False)
    calls = []
    shared.register_forward_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.SGD(holder.parameters(), lr=0.1)
    before = {**dict(holder.named_parameters()), **dict(holder.named_buffers())}
    plain = sum(type(m) is nn.BatchNorm2d for m in holder.modules())
    assert to_ghost(holder, 2) == plain == 8
    after = {**dict(holder.named_parameters()), **dict(holder.named_buffers())}
    assert before.keys() == after.keys()
    assert all(before[key] is after[key] for key in before)
    assert not shared.training and not shared.weight.requires_grad
    assert {id(p) for p in holder.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}
    assert type(holder[3]) is nn.BatchNorm1d and holder[2][0] is shared
    shared(torch.randn(4, 3, 2, 2))
    assert calls == [1]
    assert to_ghost(holder, 3) == plain
    assert shared.ghost_batch_size == 3
    assert "ghost_batch_size=3" in repr(shared)


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_channels_are_cut_and_copied_under_it(shortcut: str) -> None:
    model = ResNet(blocks=1, width=4, shortcut=shortcut)
    plain = [(s.name, s.size) for s in ChannelGraph.trace(model, torch.zeros(1, 3, 8, 8)).spaces]
    to_ghost(model, 3)
    graph = check_surgery(model, (torch.randn(7, 3, 8, 8, dtype=torch.double),), 1e-9)
    assert [(s.name, s.size) for s in graph.spaces] == plain
    assert len(graph.blocks) == 3


def test_a_removed_block_leaves_what_its_ghost_norm_did() -> None:
    """Running statistics too, which take one step a chunk."""
    model = ResNet(blocks=2, width=4).double()
    to_ghost(model, 2)
    x = torch.randn(7, 3, 8, 8, dtype=torch.double)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
    masked = copy.deepcopy(model)
    graph, masked_graph = (ChannelGraph.trace(m, x[:1]) for m in (model, masked))
    block = graph.blocks[0]
    name = block.spaces[-1].name
    graph.remove_block(block)
    space = masked_graph.space(name)
    mask(space, dropped(space.size, torch.zeros(0, dtype=torch.long)))
    for _ in range(2):
        for m in (model, masked):
            m.train()(x)
    assert_close(outputs(model, (x,)), outputs(masked, (x,)), 1e-12)


def test_a_norm_that_does_not_say_so_is_looked_into() -> None:
    """Only what says that it treats channels one by one is taken for a norm; this one mixes them."""

    class Mixing(nn.BatchNorm2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) - input.cumsum(1)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Mixing(4), nn.Conv2d(4, 2, 1))
    assert ChannelGraph.trace(model, torch.zeros(1, 3, 4, 4)).spaces == []


def config_of(*overrides: str) -> schema.Config:
    return morphtrain.compose(*SMALL, *overrides)


def test_a_run_and_its_loaded_network_have_it(tmp_path: Path) -> None:
    run = build_run(config_of("norm=ghost", "norm.ghost_batch_size=8"))
    norms = [m for m in run.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {type(m) for m in norms} == {GhostBatchNorm2d}
    assert {m.ghost_batch_size for m in norms} == {8}
    space = run.graph.spaces[0]
    run.graph.reindex(space, range(space.size - 1), run.optimizer)
    run.graph.remove_block(run.graph.blocks[0], run.optimizer)
    checkpoint.save(run, tmp_path, None)
    model = morphtrain.load(tmp_path / "last.pt")
    assert [type(m) for m in model.modules()] == [type(m) for m in run.model.modules()]
    x = torch.randn(20, *run.data.input_shape)
    assert torch.equal(model.train()(x), run.model.train()(x))
    plain = build_run(config_of())
    assert set(torch.load(tmp_path / "last.pt")["model"]) <= set(plain.model.state_dict()) | set(
        json.loads(torch.load(tmp_path / "last.pt")["facts"])["architecture"]["shapes"]
    )


@pytest.mark.parametrize(("batch", "warned"), [(16, 1), (32, 1), (33, 0)])
def test_a_ghost_norm_of_whole_batches_is_warned_of(batch: int, warned: int, small_run, caplog) -> None:
    """It compares with batch norm as a network with itself."""
    small_run("norm=ghost", "norm.ghost_batch_size=32", f"batch_policy.batch_size={batch}")
    said = [entry.getMessage() for entry in caplog.records if "one chunk" in entry.getMessage()]
    assert len(said) == warned
    assert all(line.startswith("norm.ghost_batch_size=32: a batch of ") for line in said)


def test_a_model_without_batch_norm_is_named() -> None:
    with pytest.raises(UserError, match="norm=ghost: the model has no BatchNorm2d"):
        ghost.build(schema.norm.GhostNorm("ghost", 4), nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"norm\.ghost_batch_size=0: must be 1 or more"):
        config_of("norm=ghost", "norm.ghost_batch_size=0")
