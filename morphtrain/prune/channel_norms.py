"""The importance r of channels that MorphNet sparsifies, and the proximal step on it (Gordon et al. 2018, section 4).

    norms = ChannelNorms(graph, "gamma_l1")
    slopes = norms.per_channel(cost.coefficients(norms.alive(1e-2)))
    ...
    optimizer.step()
    norms.shrink(penalty_weight * slopes, norms.step_lengths(optimizer))

The penalty is the sum over the channels of slope * r, where r is the largest of the channel's members: |gamma| of each
norm that it goes through (`gamma_l1`), or ||W[i]||_2 of each row of a weight that makes it (`group_lasso`; |g[i]| under
weight norm). At a residual sum all blocks have members, of which the largest counts: the channel goes once none of them
needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F
from torch.optim import Optimizer

from morphtrain.morph import NORMS, ChannelGraph, Slot, Space, additions_of, exact
from morphtrain.prune.step_length import step_length
from morphtrain.prune.weights import Normed, is_trained, weight_of

SHORTEST = 1e-30  # step; one of length 0 moves nothing, and its inverse is still a number

Regulariser = Literal["gamma_l1", "group_lasso"]


@dataclass(eq=False)
class Weight:
    """A parameter whose entries along `dim` are members of channels, each with the L2 norm of what it holds."""

    tensor: torch.Tensor
    dim: int

    def magnitudes(self) -> torch.Tensor:
        """(N,)"""
        tensor = exact(self.tensor.detach())
        if tensor.dim() == 1:
            return tensor.abs()
        return torch.linalg.vector_norm(tensor.transpose(0, self.dim).flatten(1), dim=1)

    def means(self, values: torch.Tensor) -> torch.Tensor:
        """(N,): the means, over the entries, of numbers for the elements of this parameter, or of a scalar for all."""
        rows = exact(values).expand_as(self.tensor).transpose(0, self.dim).reshape(self.tensor.shape[self.dim], -1)
        return rows.mean(1)

    def scale(self, factors: torch.Tensor) -> None:
        """Multiply the entries by `factors` (N,)."""
        shape = [1] * self.tensor.dim()
        shape[self.dim] = -1
        self.tensor.mul_(factors.view(shape))


class ChannelNorms:
    """The members of the channels of a graph's spaces; make a new one after every structural change.

    Args:
        graph: its model is what `shrink` changes.
        regulariser: what the members are.

    Attributes:
        spaces: those that can be regularised. Spaces without members or with a frozen one cannot; under `gamma_l1`
            neither can those with a channel that reaches a layer past all norms: it may be alive there whatever the
            norms say.
    """

    def __init__(self, graph: ChannelGraph, regulariser: Regulariser) -> None:
        slots = {space: [slot for slot in space.slots if _is_member(slot, regulariser)] for space in graph.spaces}
        bare = _past_norms(graph) if regulariser == "gamma_l1" else set()
        spaces = [s for s in graph.spaces if s not in bare and slots[s] and all(map(_is_trained, slots[s]))]
        padded = {s: _padded(sum(slot.segment.span for slot in slots[s])) for s in spaces}
        self.spaces = sorted(spaces, key=padded.__getitem__)
        used = [slot for space in self.spaces for slot in slots[space]]
        self.weights = {id(_weight(slot)): Weight(_weight(slot), slot.axis.tensors[0][1]) for slot in used}
        self.lengths = [weight.tensor.shape[weight.dim] for weight in self.weights.values()]
        offsets = dict(zip(self.weights, torch.tensor([0, *self.lengths]).cumsum(0).tolist(), strict=False))
        rows: dict[int, list[torch.Tensor]] = {}  # by their number of members, each (channels, members)
        absent = sum(self.lengths)  # the entry after the last one: always zero, it changes no maximum
        for space in self.spaces:
            row = _entries(space, slots[space], offsets)
            rows.setdefault(padded[space], []).append(F.pad(row, (0, padded[space] - row.shape[1]), value=absent))
        self.like = exact(_weight(used[0]).detach()) if used else torch.zeros(0)  # for device and dtype
        self.groups = [torch.cat(parts).to(self.like.device) for parts in rows.values()]  # each (C, M): entries
        self.sizes = [len(group) for group in self.groups]
        owner = torch.full((absent + 1,), sum(self.sizes))
        for group, channels in zip(self.groups, torch.arange(sum(self.sizes)).split(self.sizes), strict=True):
            owner[group.cpu()] = channels[:, None].expand_as(group)
        self.owner = owner[:absent].to(self.like.device)  # (E,): the channel of each entry; C if it has none

    @torch.no_grad()
    def importance(self) -> dict[Space, torch.Tensor]:
        """r of every channel of `spaces`: (size,)."""
        return dict(zip(self.spaces, self._importance().split([space.size for space in self.spaces]), strict=True))

    def alive(self, threshold: float) -> dict[Space, float]:
        """How many channels of each of `spaces` are alive: their r is `threshold` or more."""
        return {space: float((r >= threshold).sum()) for space, r in self.importance().items()}

    def per_channel(self, of_space: Mapping[Space, float]) -> torch.Tensor:
        """(C,): the value of its space for every channel of `spaces`, in order."""
        sizes = torch.tensor([space.size for space in self.spaces], dtype=torch.long)
        values = torch.tensor([of_space[space] for space in self.spaces], dtype=torch.double)
        return values.repeat_interleave(sizes).to(self.like)

    @torch.no_grad()
    def penalty(self, slopes: torch.Tensor) -> torch.Tensor:
        """sum of slope * r, a scalar tensor; `slopes` (C,)."""
        return (slopes * self._importance()).sum()

    @torch.no_grad()
    def shrink(self, amounts: torch.Tensor, lengths: torch.Tensor | None = None) -> None:
        """The proximal step: the minimiser of |new - old|^2 / 2 + sum over the channels of amount * max |member|.

        Each channel's members are clipped at the level above which `amount` of their magnitude lies in all: what the
        projection on the L1 ball of radius `amount` leaves of them (Moreau's identity). A single member is
        soft-thresholded; members that have no more than `amount` together become zero.

        Args:
            amounts: (C,), of the channels of `spaces` in order.
            lengths: (E + 1,), see `step_lengths`: a member's distance counts in units of its own step. None: all are 1.
        """
        entries = self._magnitudes()
        per_length = torch.ones_like(entries) if lengths is None else lengths.clamp(min=SHORTEST).reciprocal()
        levels = [
            _level(entries[group], per_length[group], t)
            for group, t in zip(self.groups, amounts.split(self.sizes), strict=True)
        ]
        level = torch.cat([*levels, self.like.new_full((1,), torch.inf)])  # (C + 1,)
        limits, entries = level[self.owner], entries[:-1]  # (E,)
        factors = torch.where(entries > limits, limits / entries, 1.0)
        for weight, part in zip(self.weights.values(), factors.split(self.lengths), strict=True):
            weight.scale(part)

    def step_lengths(self, optimizer: Optimizer) -> torch.Tensor:
        """(E + 1,): how far the optimizer's step goes for every entry, and 1 at the end; see `step_length`."""
        parts = [_lengths(weight, optimizer) for weight in self.weights.values()]
        return torch.cat([*parts, self.like.new_ones(1)])

    def per_length(self, optimizer: Optimizer) -> torch.Tensor:
        """(C,): 1 / length of the optimizer's steps, the mean over a channel's members."""
        return self._per_member(self.step_lengths(optimizer).clamp(min=SHORTEST).reciprocal())

    def mean_members(self) -> torch.Tensor:
        """(C,): the magnitude of a channel's members, their mean."""
        return self._per_member(self._magnitudes())

    def clear(self, dead: Mapping[Space, torch.Tensor]) -> None:
        """Set all members of the channels in the masks `dead` (size,) to zero."""
        none = torch.zeros(0, dtype=torch.bool)
        masks = [dead.get(s, torch.zeros(s.size, dtype=torch.bool)).cpu() for s in self.spaces]
        amounts = torch.zeros(sum(self.sizes)).masked_fill(torch.cat([none, *masks]), torch.inf)
        self.shrink(amounts.to(self.like))

    def _importance(self) -> torch.Tensor:
        """(C,)"""
        entries = self._magnitudes()
        return torch.cat([self.like.new_zeros(0), *(entries[group].amax(1) for group in self.groups)])

    def _per_member(self, entries: torch.Tensor) -> torch.Tensor:
        """(C,): of the channels' members, the mean of `entries` (E + 1,)."""
        absent = len(entries) - 1
        entries = entries.index_fill(0, torch.tensor(absent, device=entries.device), 0.0)
        means = [entries[group].sum(1) / (group != absent).sum(1) for group in self.groups]
        return torch.cat([self.like.new_zeros(0), *means])

    def _magnitudes(self) -> torch.Tensor:
        """(E + 1,): of every entry, and a zero at the end."""
        return torch.cat([*(weight.magnitudes() for weight in self.weights.values()), self.like.new_zeros(1)])


def _lengths(weight: Weight, optimizer: Optimizer) -> torch.Tensor:
    """(N,): the harmonic mean of an entry's steps, as in `lasso.shrink`, times the mean share that it takes of them."""
    length, like = step_length(optimizer, weight.tensor), exact(weight.tensor.detach())
    # A number that is copied to a device waits for it; one that fills a tensor there does not.
    length = length.to(like.dtype) if isinstance(length, torch.Tensor) else like.new_full((), length)
    mean = weight.means(length.reciprocal()).reciprocal()
    pace = additions_of(optimizer).factor(weight.tensor)
    return mean * weight.means(pace) if isinstance(pace, torch.Tensor) else mean


def _level(members: torch.Tensor, per_length: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
    """(C,): where to clip members (C, M) so that they lose `amounts` (C,) lengths in all; zero if they have no more.

    With lengths of 1 the level is (sum of the j largest - amount) / j for the number j that it clips, and less for any
    other; otherwise each counts by 1 / length, and j becomes the sum of these.
    """
    members, order = members.sort(1, descending=True)
    counts = per_length.gather(1, order)
    return (((members * counts).cumsum(1) - amounts[:, None]) / counts.cumsum(1)).amax(1).clamp(min=0)


def _padded(members: int) -> int:
    """The next power of two: spaces padded to as many members form one group, so that there are few groups."""
    return 1 << (members - 1).bit_length()


def _is_member(slot: Slot, regulariser: Regulariser) -> bool:
    if regulariser == "group_lasso":
        return slot.role == "produces" and slot.has_weights
    norm = slot.role == "elementwise" and isinstance(slot.axis.module, NORMS)
    return norm and slot.axis.tensors[:1] == (("weight", 0),)


def _weight(slot: Slot) -> torch.Tensor:
    """The parameter whose entries are members; of a row under weight norm its length, which is the norm of the row."""
    weight = weight_of(slot.axis.module, slot.axis.tensors[0][0])
    if isinstance(weight, Normed):
        return weight.length
    assert isinstance(weight, torch.Tensor)
    return weight


def _is_trained(slot: Slot) -> bool:
    """Whether the rows of a slot are trained, and a parameter has their norms."""
    name, dim = slot.axis.tensors[0]
    weight = weight_of(slot.axis.module, name)
    return is_trained(weight) and not (isinstance(weight, Normed) and weight.dim != dim)


def _past_norms(graph: ChannelGraph) -> set[Space]:
    """Spaces with channels that some layer takes in before they go through a norm."""
    normed: dict[str, bool] = {}
    for call in graph.calls:
        normed[call.path] = normed.get(call.path, True) and call.after_norms
    consumed = [slot for space in graph.spaces for slot in space.slots if slot.role == "consumes"]
    bare = {id(slot.segment) for slot in consumed if not normed.get(slot.axis.path, False)}
    return {space for space in graph.spaces if any(id(slot.segment) in bare for slot in space.slots)}


def _entries(space: Space, slots: list[Slot], offsets: Mapping[int, int]) -> torch.Tensor:
    """(size, members): where the members of each channel stand among all entries."""
    columns = []
    for slot in slots:
        span = slot.segment.span
        first = offsets[id(_weight(slot))] + slot.start
        columns.append(first + torch.arange(space.size * span).view(space.size, span))
    return torch.cat(columns, 1)
