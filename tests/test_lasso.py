"""The group lasso against autograd, against a numerical minimiser, and against what it must exempt."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import INPUT, build, trace
from scipy.optimize import minimize
from torch import nn

from morphtrain.morph import ChannelGraph
from morphtrain.prune.lasso import (
    GroupLasso,
    add_gradient,
    group_lassos,
    penalty,
    penalty_weight_for_ratio,
    penalty_weight_for_share,
    shrink,
    total_norm,
    total_weight,
)


def naive_penalty(lasso: GroupLasso) -> torch.Tensor:
    """The definition, group by group."""
    w = lasso.weight
    rows = sum(torch.linalg.vector_norm(w[o]) for o in range(w.shape[0]))
    columns = sum(torch.linalg.vector_norm(w[:, i]) for i in range(w.shape[1]))
    return lasso.row_weight * rows + lasso.column_weight * columns


@pytest.mark.parametrize("sqrt_size", [False, True])
@pytest.mark.parametrize("bottleneck", [False, True])
def test_value_and_gradient_are_those_of_the_definition(sqrt_size: bool, bottleneck: bool) -> None:
    model = build(2, bottleneck=bottleneck, layers=3)
    lassos = group_lassos(trace(model), sqrt_size)
    value = sum(naive_penalty(lasso) for lasso in lassos)
    torch.testing.assert_close(penalty(lassos), value.detach())
    value.backward()
    expected = [lasso.weight.grad.clone() for lasso in lassos]
    for lasso in lassos:
        lasso.weight.grad.fill_(1.0)
    add_gradient(lassos, penalty_weight=0.7)
    for lasso, gradient in zip(lassos, expected, strict=True):
        torch.testing.assert_close(lasso.weight.grad, 1.0 + 0.7 * gradient, rtol=1e-6, atol=1e-6)


def test_the_right_sides_are_exempt() -> None:
    model = build(1)
    lassos = {id(lasso.weight): lasso for lasso in group_lassos(trace(model))}
    stem, inner, last = model.stem[0].weight, model.stages[0][0].branch[0].weight, model.classifier.weight
    assert (lassos[id(stem)].row_weight, lassos[id(stem)].column_weight) == (1, 0)
    assert (lassos[id(inner)].row_weight, lassos[id(inner)].column_weight) == (1, 1)
    assert (lassos[id(last)].row_weight, lassos[id(last)].column_weight) == (0, 1)
    assert len(lassos) == sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())


def test_depthwise_kernels_norms_and_biases_are_exempt() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1), nn.Flatten()
    )
    penalised = {id(lasso.weight) for lasso in group_lassos(ChannelGraph.trace(model, INPUT[:1].float()))}
    assert penalised == {id(model[0].weight), id(model[3].weight)}


@pytest.mark.parametrize("sqrt_size", [False, True])
def test_lambda_reproduces_the_ratio(sqrt_size: bool) -> None:
    lassos = group_lassos(trace(build(3)), sqrt_size)
    gl, loss = penalty(lassos).item(), 2.345
    for ratio in (0.05, 0.25, 0.9):
        weighted = penalty_weight_for_ratio(ratio, loss, gl) * gl
        assert abs(weighted / (loss + weighted) - ratio) < 1e-6


@pytest.mark.parametrize(("rows", "columns"), [(1.0, 0.0), (0.0, 1.0)])
def test_shrinking_one_side_solves_the_proximal_problem(rows: float, columns: float) -> None:
    weight = torch.randn(3, 2, 2, 2, dtype=torch.double)
    weight[1] *= 0.05
    weight[:, 1] *= 0.3
    start = weight.clone()
    amount = 0.8
    lasso = GroupLasso(weight, rows, columns)
    shrink([lasso], amount)

    def objective(flat: np.ndarray) -> float:
        candidate = torch.from_numpy(flat).view_as(start)
        distance = 0.5 * (candidate - start).square().sum()
        return float(distance + amount * naive_penalty(GroupLasso(candidate, rows, columns)))

    found = minimize(objective, start.numpy().ravel(), method="Powell", options={"xtol": 1e-9, "ftol": 1e-13})
    assert objective(weight.numpy().ravel()) <= found.fun + 1e-7
    np.testing.assert_allclose(weight.numpy().ravel(), found.x, atol=1e-3)


def test_shrinking_both_sides_goes_rows_first_and_reaches_exact_zero() -> None:
    weight = torch.randn(4, 3, 3, 3)
    weight[2] = 0.01
    expected = weight.clone()
    for o in range(4):
        norm = expected[o].norm()
        expected[o] *= max(0.0, 1 - 0.3 / norm)
    for i in range(3):
        norm = expected[:, i].norm()
        expected[:, i] *= max(0.0, 1 - 0.3 / norm)
    shrink([GroupLasso(weight, 1.0, 1.0)], 0.3)
    torch.testing.assert_close(weight, expected)
    assert weight[2].abs().max() == 0


def test_zero_weights_give_no_nan() -> None:
    weight = nn.Parameter(torch.zeros(3, 3, 1, 1))
    weight.grad = torch.zeros_like(weight)
    lasso = GroupLasso(weight, 1.0, 1.0)
    add_gradient([lasso], 1.0)
    shrink([lasso], 0.1)
    shrink([lasso], 0.0)
    assert torch.equal(weight, torch.zeros_like(weight))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("sqrt_size", [False, True])
def test_lambda_takes_the_share_that_was_planned(sqrt_size: bool) -> None:
    """Of the norms of all groups together, as long as none of them reaches zero."""
    rows = [GroupLasso(torch.randn(size, 3, 3, 3), size**0.5 if sqrt_size else 1.0, 0.0) for size in (4, 7)]
    lassos, lengths = [*rows, GroupLasso(1 + torch.rand(2, 5), 0.0, 1.0)], [0.1, 1.0, 0.4, 0.0]
    before = total_norm(lassos)
    assert before == pytest.approx(
        sum(float(x.weight.flatten(1).norm(dim=1).sum()) for x in rows) + float(lassos[2].weight.norm(dim=0).sum())
    )
    weight = penalty_weight_for_share(0.2, before, total_weight(lassos), sum(lengths))
    for length in lengths:
        shrink(lassos, length * weight)
    assert total_norm(lassos) == pytest.approx(0.8 * before, rel=1e-5)


def test_a_group_loses_the_harmonic_mean_of_what_its_elements_would() -> None:
    weight, amounts = torch.randn(4, 3, 2, 2), torch.rand(4, 3, 2, 2)
    amounts[1, 2, 0, 0] = 1e6  # of an element without a gradient, which would move as far as it likes
    expected = weight.clone()
    for o in range(4):
        expected[o] *= max(0.0, float(1 - 1 / (1 / amounts[o]).mean() / expected[o].norm()))
    for i in range(3):
        expected[:, i] *= max(0.0, float(1 - 1 / (1 / amounts[:, i]).mean() / expected[:, i].norm()))
    shrink([GroupLasso(weight, 1.0, 1.0)], amounts)
    torch.testing.assert_close(weight, expected)
    assert weight.flatten(1).any(1).all(), "the test is about steps that leave something"
    plain = torch.randn(4, 3)
    alike = plain.clone()
    shrink([GroupLasso(alike, 1.0, 0.5)], torch.full_like(alike, 0.2))
    shrink([GroupLasso(plain, 1.0, 0.5)], 0.2)
    torch.testing.assert_close(alike, plain)


def test_an_element_loses_its_share_of_what_its_groups_do_and_slows_down_no_other() -> None:
    """A small step is one of gradient descent with a learning rate for each element; the gradient is autograd's."""
    weight, pace = torch.randn(5, 4, 2, 2).double(), 3 * torch.rand(5, 4, 2, 2).double()
    pace[:, 1], pace[2, 0] = 0.0, 1e-9  # a new column that does not learn at all, and hardly
    lasso, amount = GroupLasso(weight.clone().requires_grad_(), 1.0, 0.5), 1e-6
    naive_penalty(lasso).backward()
    shrunk = weight.clone()
    shrink([GroupLasso(shrunk, 1.0, 0.5)], amount, pace)
    torch.testing.assert_close(shrunk - weight, -amount * pace * lasso.weight.grad, rtol=1e-4, atol=1e-15)
    assert torch.equal(shrunk[:, 1], weight[:, 1])


def test_no_element_passes_zero_and_a_slow_one_gets_there_later() -> None:
    weight = torch.full((2, 3), 0.1)
    pace = torch.tensor([[1.0, 5.0, 0.25], [1.0, 5.0, 0.25]])
    shrink([GroupLasso(weight, 1.0, 0.0)], 1.0, pace)
    torch.testing.assert_close(weight, torch.tensor([[0.0, 0.0, 0.075]] * 2))
