"""What a user reads at the end, and the architecture a checkpoint keeps."""

from __future__ import annotations

import json

import pytest
import torch
from networks import INPUT, build, step, trace

from morphtrain.morph import describe, rebuild
from morphtrain.trainer.console import data_warning, epoch_line


def history(epochs: int) -> list[dict[str, float]]:
    return [
        {
            "epoch": e,
            "epoch_seconds": 100.0 if e == 1 else 10.0 / e,
            "data_seconds": 0.1,
            "train_seconds": 3.0 * e,
            "params": 1000 // e,
            "macs": 5000 // e,
            "val_accuracy": e / 100,
            "train_loss": 1.0,
            "contended": float(e == 3),
        }
        for e in range(1, epochs + 1)
    ]


def test_an_epoch_is_a_line() -> None:
    line = epoch_line(history(3)[-1], 9, "removed block x")
    assert "\n" not in line
    assert "3/9" in line
    assert line.endswith("[removed block x]")


def test_waiting_for_data_is_shown_where_it_matters() -> None:
    first, record = history(5)[::4]
    assert "2.00 s (5% waiting for data)  " in epoch_line(record, 9, "")
    assert "waiting" not in epoch_line(first, 9, "")


def test_waiting_for_data_is_warned_of_once() -> None:
    """Epoch 26 is the first that waits for more than a quarter of its 10 / 26 seconds."""
    warned = {
        epochs: text
        for epochs in range(1, 40)
        if (text := data_warning(history(epochs), warmup_epochs=1, advice="change data.x")) is not None
    }
    assert warned == {26: "26% of epoch 26 was waiting for data: change data.x"}
    slow_start = [{**history(1)[0], "data_seconds": 90.0}, *history(3)[1:]]
    assert data_warning(slow_start[:1], warmup_epochs=1, advice="") is None
    assert data_warning(slow_start[:1], warmup_epochs=0, advice="") is not None
    assert data_warning(slow_start, warmup_epochs=0, advice="") is None


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
