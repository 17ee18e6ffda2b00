"""What a user reads at the end, and the architecture a checkpoint keeps."""

from __future__ import annotations

import json

import pytest
import torch
from networks import INPUT, build, step, trace
from rich.console import Console

from morphtrain.morph import describe, rebuild
from morphtrain.trainer.console import closing_table, epoch_line

INITIAL = {"params": 1000, "macs": 5000}


def history(epochs: int) -> list[dict[str, float]]:
    return [
        {
            "epoch": e,
            "epoch_seconds": 100.0 if e == 1 else 10.0 / e,
            "train_seconds": 3.0 * e,
            "params": 1000 // e,
            "macs": 5000 // e,
            "val_accuracy": e / 100,
            "train_loss": 1.0,
        }
        for e in range(1, epochs + 1)
    ]


def rendered(epochs: int, warmup: int = 1) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(closing_table(history(epochs), INITIAL, warmup))
    return capture.get()


def test_the_table_compares_the_first_clocked_epochs_with_the_last() -> None:
    text = rendered(20)
    assert "after 20 epochs, 60.0 s of training" in text
    assert "epochs 2-6, 16-20" in text  # the warm-up epoch is left out
    assert f"{10 / 4:.3f}" in text  # the median of 10/2 .. 10/6
    assert f"{10 / 18:.3f}" in text
    assert "0.050" in text  # 50 of 1000 parameters, 250 of 5000 MACs
    assert "0.0600" in text
    assert "0.2000" in text


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_short_runs_have_a_table_too(epochs: int) -> None:
    assert f"after {epochs} epochs" in rendered(epochs)


def test_an_epoch_is_a_line() -> None:
    line = epoch_line(history(3)[-1], 9, "removed block x")
    assert "\n" not in line
    assert "3/9" in line
    assert line.endswith("[removed block x]")


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_a_described_architecture_is_rebuilt_from_json(shortcut: str) -> None:
    model = build(2, width=8, shortcut=shortcut)
    graph = trace(model)
    graph.remove_block(graph.blocks[3])
    graph.remove_block(graph.blocks[0])
    for space in list(graph.spaces):
        graph.reindex(space, torch.randperm(space.size)[: space.size // 2 + 1])
    stored = json.loads(json.dumps(describe(model)))
    again = rebuild(build(2, width=8, shortcut=shortcut), stored)
    again.load_state_dict(model.state_dict())
    assert str(again) == str(model)
    assert torch.equal(again.eval()(INPUT), model.eval()(INPUT))
    assert [(s.name, s.size) for s in trace(again).spaces] == [(s.name, s.size) for s in graph.spaces]
    step(again.train(), torch.optim.SGD(again.parameters(), lr=0.1))
