"""LARS against the paper's formula in scalars, against timm where that is installed, and with the group lasso."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import INPUT, LABELS, build, step, trace
from torch import nn
from torch.nn import functional as F

import morphtrain
from morphtrain import schema
from morphtrain.evidence.records import read_records
from morphtrain.optimizer import lars
from morphtrain.optimizer.lars import LARS
from morphtrain.prune.lasso import shrink
from morphtrain.trainer import train
from morphtrain.trainer.build import build_run

SHAPES = [(3, 2, 2, 2), (4, 3), (5,)]


def problem(seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.double)) for shape in SHAPES]


def gradients(seed: int, steps: int) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed + 1)
    return [[10 * torch.randn(s, generator=generator, dtype=torch.double) for s in SHAPES] for _ in range(steps)]


def by_hand(weights: list[list[float]], grads: list[list[list[float]]], lrs: list[float], o: dict) -> list[list[float]]:
    """Algorithm 1 of the paper with the velocity of torch, number by number."""
    weights = [list(w) for w in weights]
    velocity = [[0.0] * len(w) for w in weights]
    for now, lr in zip(grads, lrs, strict=True):
        for w, g, v in zip(weights, now, velocity, strict=True):
            size, slope = math.hypot(*w), math.hypot(*g)
            ratio = 1.0
            if size > 0 and slope > 0:
                ratio = o["trust_coefficient"] * size / (slope + o["weight_decay"] * size)
            for i in range(len(w)):
                u = ratio * (g[i] + o["weight_decay"] * w[i])
                v[i] = o["momentum"] * v[i] + u
                w[i] -= lr * (u + o["momentum"] * v[i] if o["nesterov"] else v[i])
    return weights


def after(optimizer_class: type, options: dict, seed: int, lrs: list[float], zero: bool = False) -> list[nn.Parameter]:
    parameters = problem(seed)
    if zero:
        nn.init.zeros_(parameters[0])
    optimizer = optimizer_class(parameters, lr=lrs[0], **options)
    for lr, grads in zip(lrs, gradients(seed, len(lrs)), strict=True):
        optimizer.param_groups[0]["lr"] = lr
        for p, grad in zip(parameters, grads, strict=True):
            p.grad = grad
        if zero:
            parameters[1].grad.zero_()
        optimizer.step()
    return parameters


OPTIONS = st.fixed_dictionaries(
    {
        "momentum": st.sampled_from([0.0, 0.9]),
        "nesterov": st.booleans(),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "trust_coefficient": st.sampled_from([0.001, 0.1]),
    }
)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), options=OPTIONS, zero=st.booleans())
def test_it_is_the_papers_update(seed: int, options: dict, zero: bool) -> None:
    lrs = [2.0, 1.0, 0.5, 0.5]
    start = [p.detach().flatten().tolist() for p in problem(seed)]
    grads = [[g.flatten().tolist() for g in now] for now in gradients(seed, len(lrs))]
    if zero:
        start[0] = [0.0] * len(start[0])
        for now in grads:
            now[1] = [0.0] * len(now[1])
    expected = by_hand(start, grads, lrs, options)
    for ours, theirs in zip(after(LARS, options, seed, lrs, zero), expected, strict=True):
        assert ours.flatten().tolist() == pytest.approx(theirs, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("zero", [False, True])
def test_it_agrees_with_timm(nesterov: bool, zero: bool) -> None:
    theirs = pytest.importorskip("timm.optim.lars").Lars
    lrs = [2.0, 1.0, 0.5]
    options = {"momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    ours = after(LARS, options, 0, lrs, zero)
    expected = after(theirs, {**options, "eps": 0.0, "trust_coeff": 0.001}, 0, lrs, zero)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_norms_and_biases_take_plain_steps() -> None:
    model = build()
    twin = copy.deepcopy(model)
    optimizer = lars.build(schema.optimizer.LARS("lars", 0.1, 0.9, True, 0.3, 0.01), model)
    vectors = [p for p in twin.parameters() if p.dim() <= 1]
    sgd = torch.optim.SGD(vectors, lr=0.1, momentum=0.9, nesterov=True)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    given = {p: p.grad.clone() for p in model.parameters()}
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    sgd.step()
    assert all(torch.equal(p.grad, g) for p, g in given.items()), "gradients are not the optimizer's to change"
    for p, q, old in zip(model.parameters(), twin.parameters(), before, strict=True):
        if p.dim() <= 1:
            torch.testing.assert_close(p, q)
        else:
            ratio = 0.01 * old.norm() / (p.grad.norm() + 0.3 * old.norm())
            assert optimizer.step_size(p) == pytest.approx(0.1 * ratio.item())
            torch.testing.assert_close(p, old - 0.1 * 1.9 * ratio * (p.grad + 0.3 * old))


def test_momentum_follows_a_reindexing() -> None:
    model = build()
    optimizer = lars.build(schema.optimizer.LARS("lars", 0.1, 0.9, False, 1e-3, 0.01), model)
    step(model, optimizer)
    graph = trace(model)
    space = graph.spaces[1]
    consumer = next(slot.axis.module for slot in space.slots if slot.role == "consumes")
    before, ratio = optimizer.state[consumer.weight]["momentum_buffer"], optimizer.step_size(consumer.weight)
    graph.reindex(space, [0, 0, 1], optimizer)
    after = optimizer.state[consumer.weight]["momentum_buffer"]
    torch.testing.assert_close(after, torch.stack([before[:, 0] / 2, before[:, 0] / 2, before[:, 1]], 1))
    assert optimizer.step_size(consumer.weight) == ratio
    step(model, optimizer)


def test_it_survives_a_copy_and_takes_a_closure() -> None:
    model = build()
    optimizer = lars.build(schema.optimizer.LARS("lars", 0.1, 0.9, False, 1e-3, 0.01), model)
    assert optimizer.step_size(model.classifier.weight) == 0.1

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(INPUT), LABELS)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses[-1] < losses[0]
    both_model, both = copy.deepcopy((model, optimizer))
    optimizer.step(closure)
    F.cross_entropy(both_model(INPUT), LABELS).backward()
    both.step()


def test_the_lasso_still_prunes(tmp_path: Path) -> None:
    overrides = [*SMALL, "tracking=none", "device=cpu", "optimizer=lars", "optimizer.trust_coefficient=0.02"]
    train(morphtrain.compose(*overrides), tmp_path, {})
    history = read_records(tmp_path)
    assert history[-1]["params"] < 0.9 * history[0]["params"]
    assert history[-1]["train_loss"] < history[0]["train_loss"]


def test_the_lasso_takes_each_layers_step() -> None:
    """With the whole network's learning rate in its place, nothing would be left of it."""
    run = build_run(morphtrain.compose(*SMALL, "optimizer=lars"))
    method = run.methods["prune"]
    method.before_training(run)
    method.penalty_weight, run.epoch = 0.5, 1
    F.cross_entropy(run.model(torch.randn(8, *run.data.input_shape)), torch.arange(8)).backward()
    run.optimizer.step()
    alone = [dataclasses.replace(lasso, weight=lasso.weight.detach().clone()) for lasso in method.lassos]
    method.after_step(run)
    for lasso, other in zip(method.lassos, alone, strict=True):
        shrink([other], 10 * 0.5 * float(run.optimizer.step_size(lasso.weight)))
        assert other.weight.any(), "the test is about steps that leave something"
        torch.testing.assert_close(lasso.weight.detach(), other.weight)
    sizes = {round(float(run.optimizer.step_size(lasso.weight)), 9) for lasso in method.lassos}
    assert len(sizes) == len(method.lassos)


@pytest.mark.parametrize(("size", "slope"), [(64, 2000.0), (2, 6e-8)], ids=["large", "small"])
def test_in_16_bits_norms_and_ratios_do_not_overflow(size: int, slope: float) -> None:
    """Against the formula in 64 bits; a norm of 128000 and a ratio of 170000 are too much for float16."""
    weight = torch.linspace(8.0, 12.0, size * size).view(size, size).half()
    gradient = torch.full((size, size), slope).half()
    parameter = nn.Parameter(weight.clone())
    parameter.grad = gradient.clone()
    LARS([parameter], lr=64.0, momentum=0.9, trust_coefficient=0.001).step()
    ratio = 0.001 * weight.double().norm() / gradient.double().norm()
    assert gradient.double().norm() > 65504 or ratio > 65504
    moved = weight.double() - parameter.detach().double()
    assert moved.mean() > 0.5
    torch.testing.assert_close(moved, 64.0 * ratio * gradient.double(), rtol=0.02, atol=0.0)
