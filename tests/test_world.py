"""Several processes agree on what is measured or random; one process is the plain case."""

from __future__ import annotations

import pytest
import torch
from ranks import in_ranks
from torch import distributed

from morphtrain import world
from morphtrain.errors import UserError


def decisions() -> tuple[object, ...]:
    """Everything that processes can agree on, and what is left of the tensors."""
    rank = world.rank()
    value = torch.tensor([1.0, 4.0]) * (rank + 1)
    image = torch.arange(16.0).view(1, 4, 2, 2).to(memory_format=torch.channels_last) * (rank + 1)
    count, empty = torch.tensor(rank + 1), torch.zeros(0)
    mean, before = world.mean(value), value.tolist()
    world.traffic.bytes = 0
    world.sum_([image, count, value, empty])
    summed = torch.equal(image, 3 * torch.arange(16.0).view(1, 4, 2, 2)), count.item(), value.tolist()
    with pytest.raises(UserError, match="epochs=0: 1 or more works"):
        world.decide(_refuse)
    return (
        *(world.rank(), world.size(), world.is_main(), mean.tolist(), before, summed, world.traffic.bytes),
        *(world.agree({"fastest": rank, "widths": [rank, 8]}), world.decide(lambda: rank), world.largest(float(-rank))),
    )


def test_one_process_agrees_with_itself() -> None:
    value, decision = torch.tensor([1.0, 2.0]), {"widths": [8]}
    assert (world.rank(), world.size(), world.is_main()) == (0, 1, True)
    assert world.mean(value) is value
    assert world.agree(decision) is decision
    assert world.decide(lambda: decision) is decision
    assert world.largest(2.0) == 2.0
    before = world.traffic.bytes
    world.sum_([value])
    assert value.tolist() == [1.0, 2.0]
    assert world.traffic.bytes == before
    with pytest.raises(UserError, match="epochs=0"):
        world.decide(lambda: _refuse())


def _refuse() -> None:
    raise UserError("epochs=0: 1 or more works")


def test_two_processes_take_the_first_ones_decision_and_sum() -> None:
    shared = ((True, 3, [3.0, 12.0]), 4 * (16 + 2) + 8, {"fastest": 0, "widths": [0, 8]}, 0, 0.0)
    assert in_ranks(2, decisions) == [
        (0, 2, True, [1.5, 6.0], [1.0, 4.0], *shared),
        (1, 2, False, [1.5, 6.0], [2.0, 8.0], *shared),
    ]


def fails_in_one() -> None:
    if world.rank() == 1:
        raise ValueError("only here")
    distributed.barrier()


def test_a_failure_in_one_process_is_told_with_its_traceback() -> None:
    with pytest.raises(AssertionError, match=r"rank 1: (.*\n)+.*only here"):
        in_ranks(2, fails_in_one, timeout=20)


def by_itself() -> list[object]:
    """What rank 0 finds alone, while rank 1 goes on; then what both have together."""
    rank, value = world.rank(), torch.ones(2) * (world.rank() + 1)
    found: list[object] = []
    if rank == 0:
        with world.alone():
            world.sum_([value])
            found = [world.size(), world.members(), value.tolist(), world.agree(3), world.decide(lambda: 4)]
    nested = world.decide(lambda: (world.size(), world.decide(lambda: world.largest(5.0))))
    world.wait()
    largest = world.largest_of({"a": float(rank), "b": float(-rank)})
    return [*found, nested, world.stacked(value).tolist(), largest, world.size()]


def test_a_process_that_is_alone_waits_for_nobody() -> None:
    together = [(1, 5.0), [[1.0, 1.0], [2.0, 2.0]], {"a": 1.0, "b": 0.0}, 2]
    assert in_ranks(2, by_itself) == [[1, 2, [1.0, 1.0], 3, 4, *together], together]
