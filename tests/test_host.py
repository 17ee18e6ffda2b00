"""Processes of one host: they divide its cores, and what one has made is in the memory of all, once."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import in_ranks
from torch import distributed

from morphtrain import host, schema, world
from morphtrain.data import download, fashion_mnist
from morphtrain.errors import UserError

linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is shared on Linux only")

MIB = 2**20


def private_share() -> int:
    """Bytes of this process's memory, of which those that n processes share count 1/n."""
    (found,) = re.findall(r"^Pss: +(\d+) kB$", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    return int(found) * 1024


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def one_set() -> dict[str, Any]:
    made = []

    def make() -> dict[str, Any]:
        made.append(world.rank())
        plain = host.empty((64, MIB), torch.uint8)  # 64 MiB, each page of which is written
        images = torch.arange(2.0**18).view(4, 16, 64, 64).to(memory_format=torch.channels_last)
        return {"plain": plain.fill_(7), "images": images, "part": images[1:], "few": torch.ones(3), "name": "x"}

    files, before = open_files(), private_share()
    value = host.shared(make)
    total = value["plain"].sum(dtype=torch.long).item()
    distributed.barrier()  # both have touched all of it
    grown, left = private_share() - before, open_files() - files
    distributed.barrier()
    if world.rank() == 1:
        value["plain"][3, 5] = 9
    distributed.barrier()
    return {
        "made": made,
        "total": total,
        "seen": value["plain"][3, 5].item(),
        "images": (value["images"].flatten().tolist()[:5], value["images"].stride()),
        "part": value["part"].sum().item(),
        "others": (value["few"].tolist(), value["name"]),
        "left": left,
        "grown": grown / (64 * MIB),
    }


@linux
def test_what_one_process_makes_is_in_the_memory_of_all_once() -> None:
    first, second = in_ranks(2, one_set)
    assert (first.pop("made"), second.pop("made")) == ([0], [])
    grown = first.pop("grown") + second.pop("grown")
    assert 0.9 < grown < 1.2, "each has half of it to its account"
    images = torch.arange(2.0**18).view(4, 16, 64, 64).to(memory_format=torch.channels_last)
    assert first == second
    assert (
        first
        == {
            "total": 7 * 64 * MIB,
            "seen": 9,  # which the second has written
            "images": (images.flatten().tolist()[:5], images.stride()),
            "part": images[1:].sum().item(),
            "others": ([1.0, 1.0, 1.0], "x"),
            "left": 0,
        }
    )


def test_one_process_makes_its_own() -> None:
    value = {"images": torch.ones(3)}
    assert host.shared(lambda: value) is value
    assert host.cores() == len(host.allowed())
    assert host.empty((2, 3), torch.uint8).shape == (2, 3)


def own_sets() -> int:
    if world.rank() == 2:
        host.name = lambda: ("another",)  # type: ignore[assignment]
    return int(host.shared(lambda: torch.full((MIB,), world.rank(), dtype=torch.uint8))[-1])


@linux
def test_every_host_makes_its_own() -> None:
    assert in_ranks(3, own_sets) == [0, 0, 2]


def failing_sets() -> tuple[str, str, int]:
    before, messages = open_files(), []
    for rank in (0, 1):
        if rank == 1:
            host.name = lambda: (str(world.rank()),)  # type: ignore[assignment]

        def make(failing: int = rank) -> torch.Tensor:
            if world.rank() == failing:
                raise UserError(f"data.root=x: nothing there for rank {failing}")
            return torch.zeros(MIB)

        with pytest.raises(UserError) as caught:
            host.shared(make)
        messages.append(str(caught.value))
    return messages[0], messages[1], open_files() - before


@linux
def test_a_failure_is_raised_in_all_those_of_other_hosts_too() -> None:
    expected = *(f"data.root=x: nothing there for rank {rank}" for rank in (0, 1)), 0
    assert in_ranks(2, failing_sets) == [expected, expected]


def slow_set(directory: Path) -> float:
    """In a group that waits for two seconds only."""
    rank = world.rank()
    distributed.destroy_process_group()
    meeting = f"file://{directory / 'meeting'}"
    seconds = timedelta(seconds=2)
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=seconds)

    def make() -> torch.Tensor:
        time.sleep(3)
        return torch.ones(MIB)

    return host.shared(make).sum().item()


@linux
def test_the_others_wait_longer_than_the_group_would(tmp_path: Path) -> None:
    assert in_ranks(2, slow_set, tmp_path) == [MIB, MIB]


def divided_cores(allowed: list[set[int]]) -> Fraction:
    host.allowed = lambda: frozenset(allowed[world.rank()])  # type: ignore[assignment]
    return host.cores()


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [
        ([{0, 1, 2, 3}, {0, 1, 2, 3}], [2, 2]),
        ([{0, 1}, {2, 3}], [2, 2]),  # pinned
        ([{0, 1, 2}, {2, 3}], [Fraction(5, 2), Fraction(3, 2)]),
    ],
)
def test_cores_that_several_may_use_are_divided(allowed: list[set[int]], expected: list[Fraction]) -> None:
    assert in_ranks(2, divided_cores, allowed) == expected


class Slow:
    """A data set as torchvision's: not there until a download that takes a while, and breaks if two do it at once."""

    def __init__(self, root: str, train: bool, download: bool) -> None:
        self.data = torch.arange(100 * 28 * 28).view(100, 28, 28).to(torch.uint8)
        self.targets = torch.arange(100) % 10
        files, begun = Path(root) / "files", Path(root) / "begun"
        if download and not files.exists():
            begun.open("x").close()
            time.sleep(0.3)
            files.touch()
        if not files.exists():
            raise RuntimeError("Dataset not found. You can use download=True to download it")


def downloaded(root: Path) -> schema.data.Downloaded:
    return schema.data.Downloaded(
        name="fashion_mnist", root=str(root), download=True, shift=2, flip=False, train_samples=None, val_share=0.2
    )


def with_slow(build: Callable[[schema.data.Downloaded], Any], root: Path) -> Any:
    from torchvision import datasets

    datasets.FashionMNIST = Slow
    fashion_mnist.DEBIAN = Path("nowhere")
    return build(downloaded(root))


def load_slow(root: Path) -> int:
    with_slow(lambda config: download.load("FashionMNIST", config, train=True), root)
    return len(list(root.iterdir()))


def test_of_two_downloads_to_a_place_one_waits_for_the_other(tmp_path: Path) -> None:
    """They are two runs as far as the download knows."""
    assert in_ranks(2, load_slow, tmp_path) == [2, 2], "and no lock is left"


def build_slow(root: Path) -> tuple[list[int], list[float], float]:
    calls = []

    def load(*arguments: Any, **more: Any) -> SimpleNamespace:
        calls.append(world.rank())
        return download.load(*arguments, **more)

    fashion_mnist.load = load  # type: ignore[assignment]
    data = with_slow(fashion_mnist.build, root).to(torch.device("cpu"))
    batches = list(data.train_batches(32, torch.Generator().manual_seed(3)))
    sums = [images.double().sum().item() for images, _ in batches]
    distributed.barrier()
    if world.rank() == 1:
        data._padded[0, 0, 0, 0] = 5.0
    distributed.barrier()
    return calls, sums, data._padded[0, 0, 0, 0].item()


@linux
def test_a_published_set_is_read_by_one_and_padded_once(tmp_path: Path) -> None:
    (first, sums, seen), (second, others, seen_too) = in_ranks(2, build_slow, tmp_path / "set")
    assert (first, second) == ([0, 0], [])  # train and test
    assert sums == others
    assert seen == seen_too == 5.0
