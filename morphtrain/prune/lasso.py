"""Group lasso over the channels of a network's weights (Lym et al. 2019, eq. 2), in closed form.

    lassos = group_lassos(graph)
    penalty_weight = penalty_weight_for_ratio(0.25, cross_entropy, penalty(lassos).item())
    ...
    optimizer.step()
    shrink(lassos, lr * penalty_weight / (1 - momentum))      # or morphtrain.prune.step_length

For a weight W (O, I, kh, kw) the penalty is sum_o ||W[o]||_2 + sum_i ||W[:, i]||_2. Sides that cannot be pruned are
exempt: the image side of the first convolution, the class side of the classifier, depthwise kernels, norms, biases.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from morphtrain.morph import ChannelGraph

EPS = 1e-8  # under the root of a subgradient's norm


@dataclass
class GroupLasso:
    """A penalised weight (O, I, ...) and how much its rows (outputs) and columns (inputs) count; 0 exempts a side.

    The rows of a transposed convolution (I, O, ...) are its inputs. With groups, a column holds one input of each.
    """

    weight: torch.Tensor
    row_weight: float
    column_weight: float


def group_lassos(graph: ChannelGraph, sqrt_size: bool = False) -> list[GroupLasso]:
    """Every trained weight of `graph` with a side that belongs to a channel space; call it again after a change.

    Args:
        sqrt_size: each group counts times the root of its size; otherwise all groups count alike.
    """
    free: dict[int, set[int]] = {}  # id of a weight -> its dimensions that can change
    weights: dict[int, torch.Tensor] = {}
    for axis in graph.axes:
        if axis.weight is not None and axis.weight.requires_grad and any(segment.space for segment in axis.segments):
            weights[id(axis.weight)] = axis.weight
            free.setdefault(id(axis.weight), set()).add(axis.dim)
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
        squares = _squares(lasso.weight)
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
    return sum(x.row_weight * x.weight.shape[0] + x.column_weight * x.weight.shape[1] for x in lassos)


@torch.no_grad()
def add_gradient(lassos: Iterable[GroupLasso], penalty_weight: float) -> None:
    """Add penalty_weight * dGL/dW to `.grad`: dGL/dW = W * (1/||W[o]|| + 1/||W[:, i]||)."""
    for lasso in lassos:
        squares = _squares(lasso.weight)
        rows = penalty_weight * lasso.row_weight * (squares.sum(1) + EPS).rsqrt()
        columns = penalty_weight * lasso.column_weight * (squares.sum(0) + EPS).rsqrt()
        grad = lasso.weight.grad
        if grad is None:
            continue  # the loss does not depend on it
        grad.addcmul_(lasso.weight, _spread(rows[:, None] + columns, lasso.weight))


@torch.no_grad()
def shrink(lassos: Iterable[GroupLasso], amount: float | torch.Tensor, pace: float | torch.Tensor = 1.0) -> None:
    """Soft-threshold the weights in place: every row, then every column, loses `amount` of its norm.

    Those whose norm is smaller become exactly zero. It is the proximal step of one side's penalty, then of the other's.

    Args:
        amount: of every weight; or a tensor of the weight's shape where its elements take steps of different lengths.
            A group then loses their harmonic mean: elements with hardly a gradient, whose steps are longest, count
            least.
        pace: how much of what its groups lose an element loses; a tensor of the weight's shape where some learn at
            another rate, see `Additions.factor`. It does not slow down the others of its groups, nor pass zero.
    """
    for lasso in lassos:
        squares = _squares(lasso.weight)
        of_rows, of_columns = _amounts(amount)
        rows = _soft_threshold(squares.sum(1), of_rows * lasso.row_weight)  # (O,)
        columns = _soft_threshold(rows.square() @ squares, of_columns * lasso.column_weight)  # (I,)
        factors = _spread(rows[:, None] * columns, lasso.weight)
        if isinstance(pace, torch.Tensor):
            factors = (1 - pace * (1 - factors)).clamp(min=0)
        lasso.weight.mul_(factors)


def share_taken(lasso: GroupLasso, amount: float) -> float:
    """The share of a group's norm that `shrink` takes if it takes off `amount` in all: the mean over a weight's groups.

    Its elements lose it with their row and with their column.
    """
    norm = torch.linalg.vector_norm(lasso.weight.detach()).item()
    rows, columns = lasso.weight.shape[:2]
    pull = amount * (lasso.row_weight * rows**0.5 + lasso.column_weight * columns**0.5)
    return pull / norm if norm else math.inf


def _amounts(amount: float | torch.Tensor) -> tuple[float | torch.Tensor, float | torch.Tensor]:
    """What each row, (O,), and each column, (I,), loses; both are `amount` if that is a number."""
    if not isinstance(amount, torch.Tensor) or amount.dim() == 0:
        return amount, amount
    inverse = amount.reciprocal().flatten(2).mean(2) if amount.dim() > 2 else amount.reciprocal()  # (O, I)
    return inverse.mean(1).reciprocal(), inverse.mean(0).reciprocal()


def _squares(weight: torch.Tensor) -> torch.Tensor:
    """(O, I): squared weights, summed over the kernel."""
    weight = weight.detach()
    return weight.square().flatten(2).sum(2) if weight.dim() > 2 else weight.square()


def _soft_threshold(squared_norms: torch.Tensor, amount: float | torch.Tensor) -> torch.Tensor:
    """The factor that shortens each norm by `amount`, and zero where it is shorter than that."""
    norms = squared_norms.sqrt()
    return torch.where(norms > amount, 1 - amount / norms, 0.0)


def _spread(factors: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(O, I) -> (O, I, 1, ...), to be multiplied with `weight`."""
    return factors.view(*factors.shape, *[1] * (weight.dim() - 2))


def _factor(weight: torch.Tensor, dim: int, sqrt_size: bool) -> float:
    return (weight.numel() / weight.shape[dim]) ** 0.5 if sqrt_size else 1.0
