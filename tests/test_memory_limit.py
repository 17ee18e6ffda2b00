"""What would take more memory than there is ends in one line: refused before it is taken, or when it is refused."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Command
from hydra import compose, initialize_config_dir
from torch import nn

import morphtrain
from morphtrain import memory_limit, schema
from morphtrain.errors import UserError
from morphtrain.memory_limit import (
    AllocationLimit,
    is_out_of_memory,
    machine_bytes,
    named_if_out_of_memory,
    wanted_memory,
    within_machine,
)
from morphtrain.model import ResNet
from morphtrain.trainer import train
from morphtrain.trainer.max_batch_report import show_max_batch

CPU = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
MESSAGES: dict[str, tuple[Exception, str]] = {
    "a CPU": (RuntimeError(f"{CPU} 4294967296 bytes. Error code 12 (Cannot allocate memory)"), "4 GiB"),
    "another system": (RuntimeError("not enough memory: you tried to allocate 1024 bytes."), "1 KiB"),
    "a GPU": (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 4 GiB"),
        "2.50 GiB",
    ),
    "numpy": (MemoryError("Unable to allocate 7.45 GiB for an array with shape (1000000000,)"), "7.45 GiB"),
    "Python": (MemoryError(), "more memory"),
    "arithmetic": (RuntimeError("Storage size calculation overflowed with sizes=[10, 3, 1000000000]"), "sizes=[10, 3"),
}


@pytest.mark.parametrize("source", MESSAGES)
def test_memory_that_ran_out_is_recognised_and_measured(source: str) -> None:
    error, wanted = MESSAGES[source]
    assert is_out_of_memory(error)
    assert wanted in wanted_memory(error)
    said = r"^model.width=9: out of memory, .*; lower some of these$"
    with pytest.raises(UserError, match=said), named_if_out_of_memory("model.width=9"):
        raise error


def test_other_errors_stay_what_they_are() -> None:
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("not enough memory")):
        assert not is_out_of_memory(error)
        with pytest.raises(type(error), match="m"), named_if_out_of_memory("model.width=9"):
            raise error


def test_what_really_fails_is_recognised() -> None:
    for fails in (lambda: torch.empty(2**50), lambda: torch.empty(2**40, 2**40), lambda: bytearray(2**60)):
        with pytest.raises(UserError, match="out of memory"), named_if_out_of_memory("x=1"):
            fails()


def test_an_allocation_above_the_machine_fails_instead_of_ending_the_process(monkeypatch: Any) -> None:
    status = Path("/proc/self/status").read_text()
    taken = int(status.split("VmData:")[1].split()[0]) * 1024
    monkeypatch.setattr(memory_limit, "machine_bytes", lambda: taken + 2**28)
    monkeypatch.setattr(memory_limit, "_swap_bytes", lambda: 0)
    with within_machine():
        assert len(torch.empty(2**26, dtype=torch.uint8)) == 2**26
        for fails in (lambda: torch.empty(2**30, dtype=torch.uint8), lambda: [0] * 2**28):
            with pytest.raises((RuntimeError, MemoryError)) as raised:
                fails()
            assert is_out_of_memory(raised.value)
    assert len(torch.empty(2**30, dtype=torch.uint8)) == 2**30, "the limit ends with the run"


def refused(limit: str) -> Any:
    raise UserError(limit)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_limit_counts_what_a_network_takes(device: str) -> None:
    counted = AllocationLimit(1e9, refused)
    with counted, torch.device(device):
        model = ResNet(blocks=1)
    held = sum(tensor.nbytes for tensor in model.state_dict().values() if tensor.dim())  # counters are made of a number
    assert held <= counted.bytes <= 1.1 * held
    with pytest.raises(UserError, match="more than"), AllocationLimit(held / 2, refused), torch.device(device):
        ResNet(blocks=1)
    with pytest.raises(UserError, match="more than 9 tensors"), AllocationLimit(1e9, refused, 9), torch.device(device):
        ResNet(blocks=1)


def test_a_limit_changes_no_weights() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(3, 2))
    torch.manual_seed(0)
    with AllocationLimit(1e9, refused):
        limited = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(3, 2))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), limited.parameters(), strict=True))


ABSURD = {
    "a wide network": (("model.width=1000000000",), "model.width=1000000000"),
    "a rather wide network": (("model.width=16384",), "model.width=16384"),
    "a VGG": (("model=vgg16", "model.width=100000"), "model.width=100000"),
    "a MobileNet": (("model=mobilenet_v2", "model.width_multiplier=1e6"), "model.width_multiplier=1000000.0"),
    "many stages": (("model.stages=20", "model.blocks=1"), "model.stages=20"),
    "a very great number of stages": (("model.stages=1000000000",), "model.stages=1000000000"),
    "many blocks": (("model.blocks=1000000000",), "model.blocks=1000000000"),
    "many layers": (("model.layers=1000000000",), "model.layers=1000000000"),
    "many classes": (("data.num_classes=1000000000000",), "data.num_classes=1000000000000"),
    "large images": (("data.image_size=100000",), "data.image_size=100000"),
    "images beyond all sizes": (("data.image_size=4000000000",), "data.image_size=4000000000"),
    "many images": (("data.train_samples=100000000000",), "data.train_samples=100000000000"),
    "a network of one's own": (
        ("model=custom", "model._target_=torchvision.models.AlexNet", "+model.num_classes=1000000000"),
        "model.num_classes=1000000000",
    ),
    "a growth": (("grow=wider", "grow.at_epochs=[1]", "grow.factor=1e9"), "grow.factor=1e+09"),
}


@pytest.mark.parametrize("case", ABSURD)
def test_keys_too_large_are_refused_by_what_they_would_cost(case: str, tmp_path: Path) -> None:
    overrides, key = ABSURD[case]
    general = [o for o in SMALL if not o.startswith(("model.", "prune"))]
    small = [] if "model=" in overrides[0] else ["model.width=4", "model.blocks=1"]
    config = morphtrain.compose(*general, "tracking=none", "device=cpu", "prune=none", *small, *overrides)
    began = time.perf_counter()
    with pytest.raises(UserError) as raised:
        train(config, tmp_path, {})
    assert time.perf_counter() - began < 15
    said = str(raised.value)
    assert key in said
    assert "\n" not in said
    assert any(unit in said for unit in ("GiB", "TiB", "PiB", "tensors", "sizes=", "B could"))


def test_a_largest_batch_is_not_looked_for_of_images_that_do_not_fit() -> None:
    model, shape = ["model.width=4", "model.blocks=1"], "input_shape=[3, 200000, 200000]"
    with initialize_config_dir(str(schema.CONF)):
        config = schema.parse_max_batch(compose("maxbatch", overrides=[*model, shape, "num_classes=2", "budget=1GiB"]))
    with pytest.raises(UserError, match=r"model.width=4 .*200000.*: out of memory, .* could not be had"):
        show_max_batch(config, [])


def test_a_growth_is_refused_before_it_happens(small_run: Any, monkeypatch: Any) -> None:
    from morphtrain.grow import size
    from morphtrain.grow.net2net import widen

    run = small_run()
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    monkeypatch.setattr(size, "machine_bytes", lambda: 5 * 4 * run.params)
    with pytest.raises(UserError, match=r"grow: .* parameters would take .* and this machine has "):
        widen(run.graph, 3.0, optimizer=run.optimizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())
    widen(run.graph, 2.0, optimizer=run.optimizer)


METHOD = """
import torch
from morphtrain.method import Method


class Greedy(Method):
    def before_forward(self, run, batch):
        torch.empty(2**50)
"""


def test_memory_that_runs_out_while_training_is_one_line(command: Command, tmp_path: Path) -> None:
    (tmp_path / "own_greedy.py").write_text(METHOD)
    result = command(*SMALL, "tracking=none", "methods=[{_target_: own_greedy.Greedy}]", "hydra.run.dir=run")
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if "out of memory" in line]
    for part in ("batch_policy.batch_size=16", "model.width=8", "data.image_size=8", "4096 TiB"):
        assert part in line
    assert "Traceback" not in result.stderr
    assert machine_bytes() < 2**50
