"""Growth in the loop: when, where, how far, and what the rules decide."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import SMALL, Command

import morphtrain
from morphtrain.cost import count_macs, count_params
from morphtrain.errors import UserError
from morphtrain.evidence.records import read_records
from morphtrain.evidence.strip import plot_widths
from morphtrain.grow.decision import Rules, Situation, decide
from morphtrain.grow.when import epochs_without_gain, smoothed
from morphtrain.state import Run
from morphtrain.trainer.build import build_run
from morphtrain.trainer.epoch import start
from morphtrain.trainer.loop import evaluate, train_epoch
from morphtrain.trainer.train import new_run, train

PRUNED = ("prune=prunetrain", "prune.lasso_ratio=0.5", "prune.start_epoch=2", "prune.interval=1")
GROWTHS = {
    "wider": ("grow=wider", "grow.at_epochs=[2]", "grow.factor=1.5"),
    "blocks": ("grow=deeper", "grow.at_epochs=[2]"),
    "halves": ("grow=deeper", "grow.at_epochs=[2]", "grow.start=half_half"),
    "layers": ("grow=deeper", "grow.at_epochs=[2]", "grow.operator=layer"),
    "selective": ("grow=selective", "grow.at_epochs=[2]", "grow.target=1.5", *PRUNED, "prune.lasso_ratio=0.01"),
    "morphnet": ("grow=morphnet", "grow.round_epochs=2", "grow.target=1.5", *PRUNED, "prune.stop_epoch=2"),
}


def grow(run: Run) -> None:
    """What the trainer does after an epoch."""
    for hook in run.hooks("after_epoch"):
        hook(run)
    if run.change:
        run.count()
        for hook in run.hooks("after_change"):
            hook(run)


@pytest.mark.parametrize("precision", ["o0", "bf16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("growth", GROWTHS)
def test_accuracy_stays_and_training_goes_on(small_run, growth: str, optimizer: str, precision: str) -> None:
    run = small_run("epochs=4", f"optimizer={optimizer}", f"precision={precision}", *GROWTHS[growth])
    train_epoch(run)
    grow(run)
    assert not run.change
    run.epoch = 2
    train_epoch(run)
    for hook in run.hooks("after_epoch")[:-1]:  # pruning may cost accuracy
        hook(run)
    loss, accuracy = evaluate(run)
    before, macs = run.train_loss, run.macs
    run.methods["grow"].after_epoch(run)
    assert run.change
    after_loss, after_accuracy = evaluate(run)
    if precision == "o0":
        assert after_accuracy == accuracy
        assert after_loss == pytest.approx(loss, rel=1e-5)
    run.count()
    assert run.macs > macs or growth in ("selective", "morphnet")
    for hook in run.hooks("after_change"):
        hook(run)
    run.epoch = 3
    train_epoch(run)
    assert run.train_loss <= 1.02 * before
    assert len({id(p) for g in run.optimizer.param_groups for p in g["params"]}) == len(list(run.model.parameters()))


@pytest.mark.parametrize("growth", GROWTHS)
def test_on_digits_every_prediction_stays_and_the_loss_keeps_falling(growth: str) -> None:
    overrides = ["data=digits", "model.width=8", "batch_policy.batch_size=32", "epochs=10", *GROWTHS[growth]]
    run = build_run(morphtrain.compose(*overrides))
    start(run)
    for epoch in (1, 2):
        run.epoch = epoch
        train_epoch(run)
    if "prune" in run.methods:  # which may cost accuracy
        run.methods["prune"].after_epoch(run)
    loss_before = run.train_loss
    loss, accuracy = evaluate(run)
    run.methods["grow"].after_epoch(run)
    assert run.change
    assert evaluate(run) == (pytest.approx(loss, rel=1e-5), accuracy)
    for hook in run.hooks("after_change"):
        hook(run)
    run.epoch = 3
    train_epoch(run)
    assert run.train_loss <= 1.02 * loss_before


def test_the_penalty_covers_what_has_grown(small_run) -> None:
    run = small_run(*PRUNED, "epochs=4", "grow=deeper", "grow.at_epochs=[2]")
    run.epoch = 1
    train_epoch(run)
    grow(run)
    run.epoch = 2
    grow(run)
    penalised = {id(lasso.weight) for lasso in run.methods["prune"].lassos}
    new = [p for name, p in run.model.named_parameters() if name.startswith("stages.0.1") and p.dim() > 1]
    assert len(new) == 2 and penalised.issuperset(map(id, new))


@pytest.mark.parametrize("growth", ["wider", "blocks", "layers"])
@pytest.mark.parametrize("limit", ["grow.max_params=1.3", "grow.max_macs=1.6"])
def test_hard_limits_are_never_passed(small_run, growth: str, limit: str) -> None:
    run = small_run("epochs=4", *GROWTHS[growth], "grow.at_epochs=[1,2,3]", limit)
    run.epoch = 1
    train_epoch(run)
    for epoch in (1, 2, 3):
        run.epoch = epoch
        grow(run)
    key, value = limit.removeprefix("grow.max_").split("=")
    now = {"params": count_params(run.model), "macs": count_macs(run.model, run.data.input_shape)}
    assert run.initial[key] < now[key] <= float(value) * run.initial[key]


def test_where_to_grow(small_run) -> None:
    run = small_run("epochs=4", *GROWTHS["wider"], "grow.where=[stages.1]")
    train_epoch(run)
    sizes = {space.name: space.size for space in run.graph.spaces}
    run.epoch = 2
    grow(run)
    grown = {space.name for space in run.graph.spaces if space.size > sizes[space.name]}
    assert grown == {name for name in sizes if name.startswith("stages.1")} != set()


def test_the_learning_rate_rises_again(small_run) -> None:
    run = small_run("schedule=constant", "optimizer.lr=0.2")
    assert run.learning_rate(3.0) == 0.2
    run.progress = 3.0
    run.rewarm(2.0)
    assert [run.learning_rate(done) for done in (3.0, 3.5, 4.0, 5.0, 9.0)] == pytest.approx([0, 0.05, 0.1, 0.2, 0.2])
    run.lr_factor = 0.5
    assert run.learning_rate(4.0) == pytest.approx(0.05)
    run.rewarm(0.0)
    assert run.learning_rate(3.0) == pytest.approx(0.1)


def test_weights_are_reset_unless_inherited(small_run) -> None:
    options = (*GROWTHS["morphnet"], "epochs=4", "grow.inherit=false")
    run = small_run(*options)
    run.epoch = 2
    train_epoch(run)
    assert run.optimizer.state
    before = run.model.stem[0].weight.detach().clone()
    grow(run)
    assert not run.optimizer.state
    assert not torch.allclose(run.model.stem[0].weight[: len(before)], before)
    assert all(
        torch.equal(m.weight, torch.ones_like(m.weight)) for m in run.model.modules() if hasattr(m, "running_var")
    )


def test_morphnets_rounds_meet_the_target(small_run) -> None:
    run = small_run(*GROWTHS["morphnet"], "epochs=8", "grow.rounds=3", "prune.stop_epoch=6", "prune.lasso_ratio=0.9")
    costs = []
    for epoch in range(1, 8):
        run.epoch, run.change = epoch, ""
        train_epoch(run)
        grow(run)
        costs.append(count_macs(run.model, run.data.input_shape) / run.initial["macs"])
        assert "round" not in run.change or epoch in (2, 4, 6), run.change
    for epoch in (2, 4, 6):
        assert 1.3 < costs[epoch - 1] <= 1.5
    assert costs[2] < costs[1] or costs[4] < costs[3], "shrunk in between"


# -- when -------------------------------------------------------------------------------------------------------


def test_plateaus() -> None:
    def flat(*values: float, smoothing: float = 0.0) -> int:
        return epochs_without_gain([{"val_accuracy": value} for value in values], smoothing)

    assert flat() == 0
    assert flat(0.1, 0.2, 0.3) == 0
    assert flat(0.1, 0.3, 0.2, 0.3, 0.3) == 3, "equal is no gain"
    assert flat(0.9, 0.0, 0.8, smoothing=0.5) == 2
    assert smoothed([1.0, 0.0, 0.0], 0.5) == [1.0, 0.5, 0.25]


def test_growth_on_a_plateau(small_run) -> None:
    run = small_run(
        "grow=wider", "grow.patience=2", "grow.max_times=2", "grow.factor=1.2", "grow.smoothing=0", "epochs=20"
    )
    accuracies = [0.1, 0.5, 0.4, 0.5, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1]
    grown = []
    for epoch, accuracy in enumerate(accuracies, 1):
        run.epoch, run.change = epoch, ""
        run.methods["grow"].after_epoch(run)
        run.history.append({"val_accuracy": accuracy})
        grown += [epoch] if run.change else []
    assert grown == [5, 9], "two epochs after the best; counted from scratch after a growth; not more than twice"


# -- rules ------------------------------------------------------------------------------------------------------

RULES = Rules(patience=3, smoothing=0.0, low_accuracy=0.8, high_accuracy=0.98, keep_fraction=0.9)


def situation(
    val: list[float],
    train_accuracy: float = 0.9,
    val_loss: list[float] | None = None,
    kept: float = 1.0,
    can_grow: bool = True,
    can_prune: bool = True,
    lr_lowered: bool = False,
    helped: bool = True,
) -> Situation:
    losses = val_loss or [1.0] * len(val)
    history = [
        {"val_accuracy": v, "val_loss": loss, "train_loss": 1 - 0.01 * i, "train_accuracy": train_accuracy}
        for i, (v, loss) in enumerate(zip(val, losses, strict=True))
    ]
    return Situation(history, kept, can_grow, can_prune, lr_lowered, helped)


FLAT, RISING = [0.5, 0.4, 0.4, 0.4], [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize(
    ("now", "action", "number"),
    [
        (situation(RISING[:2]), "wait", "2 of 3 epochs"),
        (situation(RISING), "wait", "flat for 0"),
        (situation(RISING, train_accuracy=0.99), "prune", "0.9900"),
        (situation(RISING, train_accuracy=0.99, can_prune=False), "wait", ""),
        (situation(RISING, val_loss=[1.0, 1.1, 1.2, 1.3]), "prune", "val_loss 1.1000 -> 1.3000"),
        (situation(RISING, train_accuracy=0.5), "grow", "underfitting: train_accuracy 0.5000"),
        (situation(RISING, train_accuracy=0.5, kept=0.5), "wait", ""),
        (situation(FLAT), "lower_lr", "flat for 3 epochs at 0.4000"),
        (situation(FLAT, lr_lowered=True), "grow", "saturation"),
        (situation(FLAT, lr_lowered=True, can_grow=False), "prune", "saturation"),
        (situation(FLAT, lr_lowered=True, can_grow=False, can_prune=False), "stop", "neither room"),
        (situation(FLAT, lr_lowered=True, helped=False), "stop", "neither a lower learning rate"),
    ],
)
def test_rules(now: Situation, action: str, number: str) -> None:
    decision = decide(now, RULES)
    assert decision.action == action
    assert number in decision.reason


# -- through the command ----------------------------------------------------------------------------------------


def test_a_run_that_grows_leaves_its_widths_and_can_be_loaded(tmp_path: Path, command: Command) -> None:
    growth = ("grow=selective", "grow.at_epochs=[3]", "grow.operator=auto", "grow.target=1.6", *PRUNED)
    result = command(*SMALL, *growth, "epochs=5", "hydra.run.dir=run", "tracking=none")
    assert result.returncode == 0, result.stderr
    assert "grow=selective: epoch 3" in result.stdout and "flops" in result.stdout
    assert (tmp_path / "run" / "widths.png").stat().st_size > 5000
    stored = json.loads(torch.load(tmp_path / "run" / "last.pt", weights_only=True)["facts"])
    changes = stored["changes"]
    assert changes[0]["epoch"] == 0 and changes[0]["event"] == ""
    assert any(change["epoch"] == 3 and "epoch 3" in change["event"] for change in changes)
    model = morphtrain.load(tmp_path / "run" / "last.pt")
    assert count_params(model) == stored["history"][-1]["params"]
    architectures = sorted((tmp_path / "run" / "architecture").iterdir())
    assert json.loads(architectures[-1].read_text())["change"] == changes[-1]["event"]


def test_rules_end_a_run_that_nothing_helps(tmp_path: Path, command: Command) -> None:
    rules = ("grow=adaptive", "grow.patience=2", "grow.max_macs=1", "grow.low_accuracy=0", "schedule=constant")
    options = (*rules, "optimizer.lr=1e-8", "prune=none", "hydra.run.dir=run", "resume=auto")
    small = [option for option in SMALL if not option.startswith("prune")]
    result = command(*small, *options, "epochs=30", "tracking=none")
    assert result.returncode == 0, result.stderr
    assert "lower_lr: saturation" in result.stdout and "training ends" in result.stdout
    assert len(read_records(tmp_path / "run")) < 15
    again = command(*small, *options, "epochs=30", "tracking=none")
    assert "epoch " not in again.stdout.split("going on after epoch")[1].split("after")[0], "it has ended"


def test_the_plot_of_widths_copes_with_spaces_that_come_and_go(tmp_path: Path) -> None:
    changes = [
        {"epoch": 0, "event": "", "widths": {"a": 8, "b": 4}},
        {"epoch": 2, "event": "removed 4 channels", "widths": {"a": 4}},
        {"epoch": 2, "event": "inserted a block", "widths": {"a": 4, "c": 6}},
    ]
    before = copy.deepcopy(changes)
    plot_widths(changes, 5, tmp_path / "widths.png")
    assert (tmp_path / "widths.png").stat().st_size > 5000
    assert changes == before


def test_a_structure_that_was_found_can_be_trained_from_scratch(tmp_path: Path, command: Command) -> None:
    found = (*SMALL, *GROWTHS["selective"], "grow.operator=auto", "prune.lasso_ratio=0.7", "prune.residual=gating")
    assert command(*found, "epochs=4", "hydra.run.dir=found", "tracking=none").returncode == 0
    small = [option for option in SMALL if not option.startswith("prune")]
    scratch = (*small, "architecture=found/last.pt", "hydra.run.dir=scratch", "resume=auto", "tracking=none")
    result = command(*scratch, "epochs=1")
    assert result.returncode == 0, result.stderr
    old, new = (morphtrain.load(tmp_path / name / "last.pt") for name in ("found", "scratch"))
    assert {n: p.shape for n, p in new.named_parameters()} == {n: p.shape for n, p in old.named_parameters()}
    for (name, a), b in zip(new.named_parameters(), old.parameters(), strict=True):
        assert a.numel() < 4 or not torch.allclose(a, b), name
    other = command(*scratch, "model.blocks=1", "hydra.run.dir=other")
    assert other.returncode == 1
    assert "model.blocks=1: architecture=found/last.pt was written with model.blocks=2" in other.stderr
    path = f"architecture={tmp_path}/found/last.pt"
    with pytest.raises(UserError) as refused:
        new_run(morphtrain.compose(*small, path, "norm=weight", "tracking=none"), torch.device("cpu"))
    assert (
        str(refused.value)
        == f"norm=weight: {path} was written with norm=batch; take the same norm, or architecture=null"
    )


@pytest.mark.parametrize(
    "grow",
    [
        ("grow=morphnet", "grow.round_epochs=1", "prune.stop_epoch=1", "prune.start_epoch=1"),
        ("grow=selective", "grow.at_epochs=[1]"),
        ("grow=adaptive",),
    ],
    ids=lambda grow: grow[0],
)
def test_growth_priced_by_latency_leaves_a_checkpoint(grow: tuple[str, ...], tmp_path: Path) -> None:
    """What the machine was measured to do goes into the checkpoint, which holds plain numbers only."""
    config = morphtrain.compose(*SMALL, *grow, "grow.cost=latency", "epochs=2", "tracking=none")
    train(config, tmp_path, {})
    train(dataclasses.replace(config, resume="auto"), tmp_path, {})
    assert len(read_records(tmp_path)) == 2
