"""Processes of one host: they divide its cores, and what one has made is in the memory of all, once."""

from __future__ import annotations

import functools
import gc
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
SET = 64 * MIB


def resident(kind: str) -> int:
    """Bytes of this process's resident memory: its own ("Anon"), or such as others may have, too ("Shmem")."""
    (found,) = re.findall(rf"^Rss{kind}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found) * 1024


def mapping(tensor: torch.Tensor) -> tuple[str, int, int]:
    """Of the memory that a tensor is in: its file's name, and how many bytes are resident, and this process's own."""
    for part in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)[1:]:
        first, _, last = part.partition(" ")[0].partition("-")
        if int(first, 16) <= tensor.data_ptr() < int(last, 16):
            found = [int(re.findall(rf"^{key}: +(\d+) kB$", part, re.MULTILINE)[0]) for key in ("Rss", "Anonymous")]
            return part.splitlines()[0].partition("/")[2], found[0] * 1024, found[1] * 1024
    raise AssertionError("it is nowhere")


def open_files() -> int:
    """How many files of shared memory this process has open."""
    places = [Path("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
    return sum("memfd:morphtrain" in os.readlink(place) for place in places if place.is_symlink())


def one_set() -> dict[str, Any]:
    made = []

    def make() -> dict[str, Any]:
        made.append(world.rank())
        plain = host.empty((64, MIB), torch.uint8)
        images = torch.arange(2.0**18).view(4, 16, 64, 64).to(memory_format=torch.channels_last)
        return {"plain": plain.fill_(7), "images": images, "part": images[1:], "few": torch.ones(3), "name": "x"}

    host.shared(lambda: torch.ones(MIB)).sum(dtype=torch.double)
    gc.collect()  # looks at all objects, whose pages are copied then
    before = {kind: resident(kind) for kind in ("Anon", "Shmem")}
    value = host.shared(make)
    total = value["plain"].sum(dtype=torch.long).item()
    distributed.barrier()  # both have touched all of it
    grown = {kind: (resident(kind) - before[kind]) / SET for kind in before}
    mapped = mapping(value["plain"])
    distributed.barrier()
    if world.rank() == 1:
        value["plain"][3, 5] = 9
    distributed.barrier()
    found = {
        "made": made,
        "total": total,
        "seen": value["plain"][3, 5].item(),
        "images": (value["images"].flatten().tolist()[:5], value["images"].stride()),
        "part": value["part"].sum().item(),
        "others": (value["few"].tolist(), value["name"]),
        "grown": grown,
        "mapped": mapped,
    }
    del value
    gc.collect()
    return found | {"left": open_files()}


def test_one_process_makes_its_own() -> None:
    value = {"images": torch.ones(3)}
    assert host.shared(lambda: value) is value
    assert host.cores() == len(host.allowed())
    assert host.empty((2, 3), torch.uint8).shape == (2, 3)


def slow_set(directory: Path) -> float:
    """In a group that waits for eight seconds only."""
    rank = world.rank()
    distributed.destroy_process_group()
    meeting = f"file://{directory / 'meeting'}"
    seconds = timedelta(seconds=8)
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=seconds)

    def make() -> torch.Tensor:
        time.sleep(10)
        return torch.ones(MIB)

    return host.shared(make).sum().item()


@linux
@pytest.mark.slow
def test_the_others_wait_longer_than_the_group_would(tmp_path: Path) -> None:
    assert in_ranks(2, slow_set, tmp_path) == [MIB, MIB]


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

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "FashionMNIST", Slow)
        patch.setattr(fashion_mnist, "DEBIAN", Path("nowhere"))
        return build(downloaded(root))


def load_slow(root: Path) -> list[str]:
    with_slow(lambda config: download.load("FashionMNIST", config, train=True), root)
    distributed.barrier()
    return sorted(path.name for path in root.iterdir())


def build_slow(root: Path) -> tuple[list[int], list[float], float]:
    calls = []

    def load(*arguments: Any, **more: Any) -> SimpleNamespace:
        calls.append(world.rank())
        return download.load(*arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fashion_mnist, "load", load)
        data = with_slow(fashion_mnist.build, root).to(torch.device("cpu"))
    batches = list(data.train_batches(32, torch.Generator().manual_seed(3)))
    sums = [images.double().sum().item() for images, _ in batches]
    distributed.barrier()
    if world.rank() == 1:
        data._padded[0, 0, 0, 0] = 5.0
    distributed.barrier()
    return calls, sums, data._padded[0, 0, 0, 0].item()


def own_sets() -> int:
    """As if each process were on a host of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "name", lambda: (str(world.rank()),))
        return int(host.shared(lambda: torch.full((MIB,), world.rank(), dtype=torch.uint8))[-1])


def failing_sets() -> tuple[list[str], int]:
    """What is told of a failure in the first process of this host, and in that of another one; what stays open."""
    messages = []
    for failing in (0, 1):

        def make(failing: int = failing) -> torch.Tensor:
            if world.rank() == failing:
                raise UserError(f"data.root=x: nothing there for rank {failing}")
            return torch.zeros(MIB)

        with pytest.MonkeyPatch.context() as patch:
            if failing == 1:
                patch.setattr(host, "name", lambda: (str(world.rank()),))
            with pytest.raises(UserError) as caught:
                host.shared(make)
        messages.append(str(caught.value))
        del caught  # its traceback has what this process has made
    gc.collect()
    return messages, open_files()


ALLOWED = (
    ([{0, 1, 2, 3}, {0, 1, 2, 3}], [2, 2]),
    ([{0, 1}, {2, 3}], [2, 2]),  # pinned
    ([{0, 1, 2}, {2, 3}], [Fraction(5, 2), Fraction(3, 2)]),
)


def divided_cores() -> list[Fraction]:
    found = []
    for allowed, _ in ALLOWED:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(host, "allowed", functools.partial(frozenset, allowed[world.rank()]))
            found.append(host.cores())
    return found


def everything(directory: Path) -> dict[str, Any]:
    return {
        "one": one_set(),
        "own": own_sets(),
        "failing": failing_sets(),
        "cores": divided_cores(),
        "loaded": load_slow(directory / "loaded"),
        "built": build_slow(directory / "built"),
    }


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes of a host has found."""
    return in_ranks(2, everything, tmp_path_factory.mktemp("sets"))


@linux
def test_what_one_process_makes_is_in_the_memory_of_all_once(both: list[dict[str, Any]]) -> None:
    first, second = (dict(found["one"]) for found in both)
    assert (first.pop("made"), second.pop("made")) == ([0], [])
    for grown in (first.pop("grown"), second.pop("grown")):
        assert 1 <= grown["Shmem"] < 1.1, "both look at all of it"
        assert grown["Anon"] < 0.9, "and have no copy of it; what else grows depends on huge pages and other tests"
    for name, looked_at, own in (first.pop("mapped"), second.pop("mapped")):
        assert (name, looked_at, own) == ("memfd:morphtrain (deleted)", SET, 0)
    images = torch.arange(2.0**18).view(4, 16, 64, 64).to(memory_format=torch.channels_last)
    expected = {
        "total": 7 * SET,
        "seen": 9,  # which the second has written
        "images": (images.flatten().tolist()[:5], images.stride()),
        "part": images[1:].sum().item(),
        "others": ([1.0, 1.0, 1.0], "x"),
        "left": 0,
    }
    assert first == second == expected


def test_every_host_makes_its_own(both: list[dict[str, Any]]) -> None:
    assert [found["own"] for found in both] == [0, 1]


def test_a_failure_is_raised_in_all_those_of_other_hosts_too(both: list[dict[str, Any]]) -> None:
    expected = [f"data.root=x: nothing there for rank {rank}" for rank in (0, 1)], 0
    assert [found["failing"] for found in both] == [expected] * 2


def test_cores_that_several_may_use_are_divided(both: list[dict[str, Any]]) -> None:
    for number, (_, expected) in enumerate(ALLOWED):
        assert [found["cores"][number] for found in both] == expected


def test_of_two_downloads_to_a_place_one_waits_for_the_other(both: list[dict[str, Any]]) -> None:
    """They are two runs as far as the download knows."""
    assert [found["loaded"] for found in both] == [["begun", "files"]] * 2, "and no lock is left"


@linux
def test_a_published_set_is_read_by_one_and_padded_once(both: list[dict[str, Any]]) -> None:
    (first, sums, seen), (second, others, seen_too) = (found["built"] for found in both)
    assert (first, second) == ([0, 0], [])  # train and test
    assert sums == others
    assert seen == seen_too == 5.0
