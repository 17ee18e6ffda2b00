"""Several processes agree on what is measured or random; one process is the plain case."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from morphtrain import world

PROCESS = """
import sys
import torch
from torch import distributed
from morphtrain import world

rank, file = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
value = torch.tensor([1.0, 4.0]) * (rank + 1)
mean, agreed = world.mean(value), world.agree({"fastest": rank, "widths": [rank, 8]})
print(world.rank(), world.size(), world.is_main(), mean.tolist(), value.tolist(), agreed)
"""


def test_one_process_agrees_with_itself() -> None:
    value, decision = torch.tensor([1.0, 2.0]), {"widths": [8]}
    assert (world.rank(), world.size(), world.is_main()) == (0, 1, True)
    assert world.mean(value) is value
    assert world.agree(decision) is decision


def test_two_processes_take_the_first_ones_decision_and_average(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROCESS]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meet")], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=120)[0].strip() for process in processes]
    agreed = "{'fastest': 0, 'widths': [0, 8]}"
    assert said == [
        f"0 2 True [1.5, 6.0] [1.0, 4.0] {agreed}",
        f"1 2 False [1.5, 6.0] [2.0, 8.0] {agreed}",
    ]
