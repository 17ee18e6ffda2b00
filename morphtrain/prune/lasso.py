"""Group lasso over the channels of a network's weights (Lym et al. 2019, eq. 2), in closed form.

    lassos = group_lassos(graph)
    penalty_weight = penalty_weight_for_ratio(0.25, cross_entropy, penalty(lassos).item())
    ...
    optimizer.step()
    shrink(lassos, lr * penalty_weight / (1 - momentum))      # or each by its amount_of_step

For a weight W (O, I, kh, kw) the penalty is sum_o ||W[o]||_2 + sum_i ||W[:, i]||_2. Sides that cannot be pruned are
exempt: the image side of the first convolution, the class side of the classifier, depthwise kernels, norms, biases.
Under weight norm W is the weight that the layer uses. One that is computed in another way (spectral norm) is exempt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from morphtrain.morph import Axis, ChannelGraph, additions_of, exact
from morphtrain.morph.effective import identity
from morphtrain.prune.step_length import step_length
from morphtrain.prune.weights import (
    Computed,
    Normed,
    add_to_gradient,
    is_trained,
    multiply,
    shape_of,
    turning,
    value_of,
    weight_of,
)

EPS = 1e-8  # under the root of a subgradient's norm

Side = float | torch.Tensor  # what each row, or each column, loses: a number, or (O,) or (I,)
Amount = Side | tuple[Side, Side]  # see `shrink`


@dataclass
class GroupLasso:
    """A penalised weight (O, I, ...) and how much its rows (outputs) and columns (inputs) count; 0 exempts a side.

    The rows of a transposed convolution (I, O, ...) are its inputs. With groups, a column holds one input of each.
    """

    weight: torch.Tensor | Normed
    row_weight: float
    column_weight: float


def group_lassos(graph: ChannelGraph, sqrt_size: bool = False) -> list[GroupLasso]:
    """Every trained weight of `graph` with a side that belongs to a channel space; call it again after a change.

    Args:
        sqrt_size: each group counts times the root of its size; otherwise all groups count alike.
    """
    free: dict[int, set[int]] = {}  # identity of a weight -> its dimensions that can change
    weights: dict[int, torch.Tensor | Normed] = {}
    for axis in graph.axes:
        weight = _penalised(axis)
        if weight is not None and any(segment.space for segment in axis.segments):
            key = identity(axis.module, axis.tensors[0][0])
            weights[key] = weight
            free.setdefault(key, set()).add(axis.dim)
    return [
        GroupLasso(
            weight,
            row_weight=_factor(weight, 0, sqrt_size) if 0 in free[key] else 0.0,
            column_weight=_factor(weight, 1, sqrt_size) if 1 in free[key] else 0.0,
        )
        for key, weight in weights.items()
    ]


def penalty(lassos: Iterable[GroupLasso]) -> torch.Tensor:
    """The value GL of the penalty, a scalar tensor; no gradient flows through it."""
    total = torch.zeros(())
    for lasso in lassos:
        squares = _squares(value_of(lasso.weight))
        rows = lasso.row_weight * squares.sum(1).sqrt().sum()
        total = total.to(rows.device) + rows + lasso.column_weight * squares.sum(0).sqrt().sum()
    return total


def penalty_weight_for_ratio(ratio: float, loss: float, penalty: float) -> float:
    """The lambda with which lambda * penalty is the share `ratio`, in (0, 1), of loss + lambda * penalty."""
    return ratio * loss / ((1 - ratio) * penalty)


def penalty_weight_for_share(share: float, norms: float, weights: float, length: float) -> float:
    """The lambda that takes `share` of what all groups measure off them, if no gradient is against it.

    It is the same for a network of any size and for a run of any number of steps.

    Args:
        norms: the sum of the norms of all groups, see `total_norm`.
        weights: the sum of how much they count, see `total_weight`.
        length: of all steps together, each of them lr / (1 - momentum).
    """
    return share * norms / (weights * length)


def total_norm(lassos: Iterable[GroupLasso]) -> float:
    """The sum of the norms of all groups, each counted once."""
    once = [GroupLasso(x.weight, float(x.row_weight > 0), float(x.column_weight > 0)) for x in lassos]
    return penalty(once).item()


def total_weight(lassos: Iterable[GroupLasso]) -> float:
    """How much all groups together count."""
    return sum(x.row_weight * shape_of(x.weight)[0] + x.column_weight * shape_of(x.weight)[1] for x in lassos)


@torch.no_grad()
def add_gradient(lassos: Iterable[GroupLasso], penalty_weight: float) -> None:
    """Add penalty_weight * dGL/dW to `.grad`: dGL/dW = W * (1/||W[o]|| + 1/||W[:, i]||)."""
    for lasso in lassos:
        value = value_of(lasso.weight)
        squares = _squares(value)
        rows = penalty_weight * lasso.row_weight * (squares.sum(1) + EPS).rsqrt()
        columns = penalty_weight * lasso.column_weight * (squares.sum(0) + EPS).rsqrt()
        add_to_gradient(lasso.weight, _spread(rows[:, None] + columns, value))


@torch.no_grad()
def shrink(lassos: Iterable[GroupLasso], amount: Amount, pace: float | torch.Tensor = 1.0) -> None:
    """Soft-threshold the weights in place: every row, then every column, loses `amount` of its norm.

    Those whose norm is smaller become exactly zero. It is the proximal step of one side's penalty, then of the other's.

    Args:
        amount: of every weight; or a tensor of the weight's shape where its elements take steps of different lengths.
            A group then loses their harmonic mean: elements with hardly a gradient, whose steps are longest, count
            least. Or one amount for the rows and one for the columns.
        pace: how much of what its groups lose an element loses; a tensor of the weight's shape where some learn at
            another rate, see `pace_of_step`. It does not slow down the others of its groups, nor pass zero.
    """
    for lasso in lassos:
        value = value_of(lasso.weight)
        squares = _squares(value)
        of_rows, of_columns = _amounts(amount)
        rows = _soft_threshold(squares.sum(1), of_rows * lasso.row_weight)  # (O,)
        columns = _soft_threshold(rows.square() @ squares, of_columns * lasso.column_weight)  # (I,)
        factors = _spread(rows[:, None] * columns, value)
        if isinstance(pace, torch.Tensor):
            factors = (1 - pace * (1 - factors)).clamp(min=0)
        multiply(lasso.weight, factors)


@torch.no_grad()
def amount_of_step(lasso: GroupLasso, optimizer: Optimizer, penalty_weight: float) -> Any:
    """What the step that the optimizer has just taken gives `shrink` to take off a weight; see `step_length`.

    Under weight norm a row becomes shorter as g does, and turns as v does. So the groups along g lose as much as a step
    of g is long. The others, which lie across it, lose what steps of v come to in the weight: `turning` times their
    length, the mean over a group's elements by their squares.
    """
    weight = lasso.weight
    if not isinstance(weight, Normed):
        return step_length(optimizer, weight) * penalty_weight
    along = _amounts(step_length(optimizer, weight.length) * penalty_weight)
    across = _amounts(step_length(optimizer, weight.direction) * penalty_weight)
    squares, turned = _squares(value_of(weight)), turning(weight)
    turned = turned.reshape(turned.shape[:2])  # spreads over (O, I)

    def of_side(dim: int) -> Side:
        if dim == weight.dim:
            return along[dim]
        total = squares.sum(1 - dim)  # 0: of a dead group, which loses nothing more
        return across[dim] * torch.where(total > 0, (squares * turned).sum(1 - dim) / total, 1.0)

    return of_side(0), of_side(1)


def pace_of_step(lasso: GroupLasso, optimizer: Optimizer) -> float | torch.Tensor:
    """The `pace` of `shrink`: the factor on each element's learning rate, where a growth has given some their own."""
    weight = lasso.weight
    return additions_of(optimizer).factor(weight.direction if isinstance(weight, Normed) else weight)


def share_taken(lasso: GroupLasso, amount: Amount) -> float:
    """The share of a group's norm that `shrink` takes if it takes off `amount` in all: the mean over a weight's groups.

    Its elements lose it with their row and with their column.
    """
    norm = torch.linalg.vector_norm(exact(value_of(lasso.weight))).item()
    counts = shape_of(lasso.weight)[:2]
    of_sides = (float(1 / (1 / torch.as_tensor(of_side)).mean()) for of_side in _amounts(amount))
    counted = zip(of_sides, (lasso.row_weight, lasso.column_weight), counts, strict=True)
    pull = sum(of_side * weight * count**0.5 for of_side, weight, count in counted)
    return pull / norm if norm else math.inf


def _penalised(axis: Axis) -> torch.Tensor | Normed | None:
    """The weight that makes or uses the channels of an axis, if a penalty can act on it."""
    if axis.weight is None:
        return None
    weight = weight_of(axis.module, axis.tensors[0][0])
    return None if isinstance(weight, Computed) or not is_trained(weight) else weight


def _amounts(amount: Amount) -> tuple[Side, Side]:
    """What each row, (O,), and each column, (I,), loses; both are `amount` if that is a number."""
    if isinstance(amount, tuple):
        return amount
    if not isinstance(amount, torch.Tensor) or amount.dim() == 0:
        return amount, amount
    inverse = exact(amount).reciprocal()
    inverse = inverse.flatten(2).mean(2) if amount.dim() > 2 else inverse  # (O, I)
    return inverse.mean(1).reciprocal(), inverse.mean(0).reciprocal()


def _squares(weight: torch.Tensor) -> torch.Tensor:
    """(O, I): squared weights, summed over the kernel, in 32 bits or more: squares of 16 bits would soon be zero."""
    weight = exact(weight)
    return weight.square().flatten(2).sum(2) if weight.dim() > 2 else weight.square()


def _soft_threshold(squared_norms: torch.Tensor, amount: float | torch.Tensor) -> torch.Tensor:
    """The factor that shortens each norm by `amount`, and zero where it is shorter than that."""
    norms = squared_norms.sqrt()
    return torch.where(norms > amount, 1 - amount / norms, 0.0)


def _spread(factors: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(O, I) -> (O, I, 1, ...), to be multiplied with `weight`."""
    return factors.view(*factors.shape, *[1] * (weight.dim() - 2))


def _factor(weight: torch.Tensor | Normed, dim: int, sqrt_size: bool) -> float:
    shape = shape_of(weight)
    return (shape.numel() / shape[dim]) ** 0.5 if sqrt_size else 1.0
