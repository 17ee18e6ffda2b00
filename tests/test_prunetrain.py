"""PruneTrain in the loop: lambda, the pause at the end, skipped steps, densities."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import mask

import morphtrain
from morphtrain.cost import latency
from morphtrain.cost.params import count_weights
from morphtrain.prune.lasso import group_lassos, penalty
from morphtrain.prune.reconfigure import live_channels
from morphtrain.prune.when import is_active, is_due
from morphtrain.state import Run
from morphtrain.trainer.build import build_run
from morphtrain.trainer.epoch import start
from morphtrain.trainer.loop import train_epoch


def first_batch_loss(run: Run) -> float:
    model = copy.deepcopy(run.model).train()
    images, labels = next(iter(run.data.train_batches(run.batch_size, run.generator(1))))
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(model(images), labels).item()


@pytest.mark.parametrize("group_weight", ["none", "sqrt_size"])
@pytest.mark.parametrize("update", ["proximal", "subgradient"])
def test_lambda_gives_the_ratio_on_the_first_batch_and_stays(small_run, group_weight: str, update: str) -> None:
    run = small_run("prune.lasso_ratio=0.3", f"prune.group_weight={group_weight}", f"prune.update={update}")
    gl = penalty(group_lassos(run.graph, sqrt_size=group_weight == "sqrt_size")).item()
    loss = first_batch_loss(run)
    train_epoch(run)
    strength = run.methods["prune"].penalty_weight
    assert abs(strength * gl / (loss + strength * gl) - 0.3) < 1e-6
    run.epoch = 2
    train_epoch(run)
    assert run.methods["prune"].penalty_weight == strength


@pytest.mark.parametrize("update", ["proximal", "subgradient"])
def test_the_penalty_shrinks_groups_and_pauses_after_stop_epoch(small_run, update: str) -> None:
    options = (
        f"prune.update={update}",
        "prune.stop_epoch=2",
        "prune.start_epoch=1",
        "prune.interval=50",
        "optimizer.weight_decay=0",
    )
    with_penalty, without = small_run(*options), small_run(*options, "prune.lasso_ratio=1e-9")
    for epoch in (1, 2):
        for run in (with_penalty, without):
            run.epoch = epoch
            train_epoch(run)
    sizes = [penalty(group_lassos(run.graph)).item() for run in (with_penalty, without)]
    assert sizes[0] < 0.8 * sizes[1]
    assert with_penalty.hooks("after_epoch")[0](with_penalty)["lasso_ratio"] > 0
    # From here on both are trained by the loss alone: the same network takes the same steps.
    without.model.load_state_dict(with_penalty.model.state_dict())
    without.optimizer.load_state_dict(copy.deepcopy(with_penalty.optimizer.state_dict()))
    for run in (with_penalty, without):
        run.epoch = 3
        train_epoch(run)
        assert run.hooks("after_epoch")[0](run) == {"lasso_ratio": 0.0}
    for a, b in zip(with_penalty.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_reconfiguration_keeps_to_its_epochs(small_run) -> None:
    run = small_run("prune.interval=3", "prune.start_epoch=2", "prune.stop_epoch=8")
    assert [epoch for epoch in range(1, 12) if is_due(run.config.prune, epoch)] == [2, 5, 8, 11]
    assert [epoch for epoch in range(1, 12) if is_active(run.config.prune, epoch)] == list(range(1, 9))


def test_a_skipped_step_moves_neither_the_schedule_nor_the_weights(small_run, monkeypatch) -> None:
    run = small_run()
    monkeypatch.setattr(run.precision, "step", lambda optimizer: False)
    before = copy.deepcopy(run.model)
    train_epoch(run)
    assert run.progress == 0
    for a, b in zip(run.model.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b)


def test_progress_and_learning_rate_follow_the_samples(small_run) -> None:
    run = small_run()
    train_epoch(run)
    assert run.progress == pytest.approx(1.0)
    last_step = 1 - 0.5 * run.batch_size / len(run.data.train)
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * run.schedule(last_step))


def test_densities_count_what_is_alive(small_run) -> None:
    run = small_run()
    assert live_channels(run.graph, 1e-4) == run.initial["channels"]
    assert count_weights(run.model) == run.initial["weights"]
    with torch.no_grad():
        run.model.stages[0][0].branch[0].weight[3] = 0
        run.model.stages[0][0].branch[3].weight[:, 3] = 0
    assert live_channels(run.graph, 1e-4) == run.initial["channels"] - 1
    assert count_weights(run.model, 1e-12) == run.initial["weights"] - 2 * 8 * 9


def test_ignored_modules_keep_their_shape(small_run) -> None:
    run = small_run("prune.ignore=[stages.1]", "prune.lasso_ratio=0.9")
    shapes = {name: p.shape for name, p in run.model.named_parameters() if name.startswith("stages.1")}
    names = {axis.path for axis in run.graph.axes}
    assert not any(name.startswith("stages.1") for name in names)
    for space in list(run.graph.spaces):
        run.graph.reindex(space, range(max(1, space.size - 2)), run.optimizer)
    train_epoch(run)
    assert run.graph.spaces
    assert {name: p.shape for name, p in run.model.named_parameters() if name in shapes} == shapes
    everything = small_run("prune.ignore=[]")
    assert len(everything.graph.spaces) > len(run.graph.spaces)


def test_frozen_weights_are_not_shrunk(small_run) -> None:
    run = small_run("prune.lasso_ratio=0.9")
    frozen = run.model.stages[0][0].branch[0].weight
    frozen.requires_grad_(False)
    before = frozen.detach().clone()
    run.methods["prune"].before_training(run)
    train_epoch(run)
    assert torch.equal(frozen, before)


def kill_a_third(run: Run) -> dict[str, int]:
    """How many channels of each space are left."""
    for space in run.graph.spaces:
        mask(space, torch.arange(space.size // 3))
    return {space.name: space.size - space.size // 3 for space in run.graph.spaces}


def test_widths_are_rounded_by_what_was_measured_before_the_first_epoch(
    small_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("prune.round_to=auto", "model.width=32", "prune.start_epoch=1")
    run = small_run(*options)
    method = run.methods["prune"]
    assert method.latency, "so that it is on the clock of the set-up"
    monkeypatch.setattr(latency, "fastest", None)  # nothing is measured from here on
    again = build_run(run.config)
    again.methods["prune"].load_state_dict({**method.state_dict(), "strength": 1e-4})
    start(again)
    method.penalty_weight, run.train_loss, again.train_loss, again.epoch = 1e-4, 1.0, 1.0, 1
    for each in (run, again):
        each.methods["prune"].latency.update({key: [1e-06, 1e-06, 1e-06, 0.0] for key in method.latency})
        left = kill_a_third(each)
        each.methods["prune"].after_epoch(each)
        assert "removed" in each.change
        widths = {space.name: space.size for space in each.graph.spaces}
        assert all(left[name] <= width for name, width in widths.items())
        assert all(axis.length % 8 == 0 for axis in each.graph.axes if axis.weight is not None and axis.length > 10)
    assert [space.size for space in again.graph.spaces] == [space.size for space in run.graph.spaces]
    assert again.methods["prune"].latency == method.latency


def test_what_costs_no_time_stays(small_run) -> None:
    run = small_run("prune.round_to=auto", "prune.round_down=0.5", "model.width=32", "prune.start_epoch=1")
    method = run.methods["prune"]
    method.penalty_weight, run.train_loss = 1e-4, 1.0
    method.latency.update({key: [0.0, 0.0, 0.0, 1.0] for key in method.latency})
    kill_a_third(run)
    method.after_epoch(run)
    assert not run.change


def test_a_network_that_cannot_be_followed_trains_without_a_method() -> None:
    options = ["model=torchvision", "model.name=vit_b_16", "data=synthetic", "data.image_size=32"]
    options += ["+model.options.image_size=32"]
    run = build_run(morphtrain.compose(*options))
    assert run.graph.spaces == []
    run = build_run(morphtrain.compose(*options, "prune=prunetrain", "prune.ignore=['*.self_attention']"))
    assert [space.name for space in run.graph.spaces] == [f"encoder.layers.encoder_layer_{i}.mlp.0" for i in range(12)]
