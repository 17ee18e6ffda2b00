"""How strong a penalty is: planned, under any optimizer, alike in networks of any size; and what it warns of."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL
from torch import nn
from whole_runs import trained_to_the_end

import morphtrain
from morphtrain.errors import UserError
from morphtrain.prune import prunetrain, strength
from morphtrain.prune.lasso import total_norm, total_weight
from morphtrain.prune.step_length import step_length
from morphtrain.state import Run
from morphtrain.trainer import checkpoint
from morphtrain.trainer.build import build_run
from morphtrain.trainer.epoch import begin_epoch, finish_epoch, start
from morphtrain.trainer.loop import train_epoch

LINEAR = ("batch_policy.lr_scaling=linear", "batch_policy.warmup_epochs=0")
PLANNED = ("prune.lasso_ratio_of=initial_norm", "prune.lasso_ratio=0.3")
LARS = ("optimizer=lars", "optimizer.trust_coefficient=0.02")
RMSPROP = ("optimizer=custom", "optimizer._target_=torch.optim.RMSprop", "+optimizer.lr=0.001")
MORPHNET = [*(override for override in SMALL if not override.startswith("prune")), "prune=morphnet"]


class Signum(torch.optim.Optimizer):
    """Steps by sign: how far they go is nowhere to be seen."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad.sign(), alpha=-group["lr"])


SIGNUM = ("optimizer=custom", "optimizer._target_=test_strength.Signum", "+optimizer.lr=0.001")


def trained(*overrides: str) -> Run:
    return trained_to_the_end(morphtrain.compose(*overrides))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize(
    "options",
    [
        ("schedule.warmup_epochs=1.5",),
        ("schedule=milestones", "schedule.milestones=[0.4]", "prune.stop_epoch=2", "prune.start_epoch=1"),
        ("optimizer.lr=0.05", "optimizer.momentum=0.95", "optimizer.nesterov=false", "prune.group_weight=sqrt_size"),
        ("batch_policy.batch_size=100", "epochs=8"),
        ("batch_policy=adabatch", "batch_policy.every=1", "batch_policy.max_batch_size=64", *LINEAR),
    ],
)
def test_a_run_takes_what_its_ratio_says(options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what its groups measure at the start, by steps of lr / (1 - momentum) = 1."""
    amounts, shrink = [], prunetrain.shrink

    def watched(lassos: Any, amount: float, pace: float) -> None:
        amounts.append(amount)
        shrink(lassos, amount, pace)

    monkeypatch.setattr(prunetrain, "shrink", watched)
    monkeypatch.setattr(strength, "LARGEST_LOSS_SHARE", 1 - 1e-9)
    run = build_run(morphtrain.compose(*SMALL, "epochs=4", *PLANNED, *options))
    start(run)
    lassos = run.methods["prune"].lassos
    wanted = 0.3 * total_norm(lassos) / total_weight(lassos)
    while run.epoch < run.config.epochs:
        begin_epoch(run)
        train_epoch(run)
        finish_epoch(run)
    assert sum(amounts) / len(lassos) == pytest.approx(wanted, rel=0.02)


def pull(*overrides: str) -> float:
    """Lambda of a run's first batch, times the number of its steps."""
    run = build_run(morphtrain.compose("prune=prunetrain", "data.image_size=8", *overrides))
    start(run)
    run.epoch, run.loss = 1, torch.tensor(2.3)
    method = run.methods["prune"]
    method.after_backward(run)
    assert method.penalty_weight is not None
    return method.penalty_weight * -(-len(run.data.train) // run.batch_size) * run.config.epochs


@pytest.mark.parametrize("weight", [0.0, 0.1])
@pytest.mark.parametrize("prune", ["prunetrain", "morphnet"])
def test_where_the_loss_is_zero_the_penalty_has_all_of_it_or_none(prune: str, weight: float) -> None:
    """A hinge loss is exactly zero where the classes are far enough apart."""
    run = build_run(morphtrain.compose(*SMALL, f"prune={prune}"))
    start(run)
    begin_epoch(run)
    train_epoch(run)
    method: Any = run.methods["prune"]
    run.train_loss, method.penalty_weight = 0.0, weight
    assert method.after_epoch(run)["lasso_ratio"] == (1.0 if weight else 0.0)


def test_a_ratio_pulls_alike_in_networks_of_any_size_and_runs_of_any_length() -> None:
    """The paper's pulls ResNet-8 four times as hard as ResNet-32, and ten times as far in a run ten times as long."""
    loss = ("prune.lasso_ratio_of=loss", "prune.lasso_ratio=0.7")
    small, *others = ((), ("model=resnet32",), ("model.width=32",), ("epochs=600", "optimizer=adamw"))
    planned = pull(*small)
    assert [pull(*other) / planned for other in others] == pytest.approx([1.0, 1.0, 1.0], rel=0.2)
    resnet32, _, long = (pull(*other, *loss) / pull(*small, *loss) for other in others)
    assert resnet32 < 0.25
    assert long == pytest.approx(10)


def test_a_short_run_is_not_drowned_by_its_penalty(caplog: pytest.LogCaptureFixture) -> None:
    """The plan of a few steps would be 97 % of the loss, and leave the accuracy of guessing."""
    run = trained("data.image_size=8", "model.width=8", "prune=prunetrain", "prune.start_epoch=1", "epochs=3")
    (said,) = (line for line in warnings(caplog) if "limited to" in line)
    assert 0.1 < float(said.removeprefix("prune.lasso_ratio=4: limited to ").partition(":")[0]) < 3
    assert run.history[0]["lasso_ratio"] < 0.85
    assert run.history[-1]["val_accuracy"] > 0.5


def with_a_frozen_stem(params: Any, lr: float) -> torch.optim.Optimizer:
    """The first parameters are not trained: their group has a learning rate of 0."""
    first, *others = params
    return torch.optim.SGD([{"params": [first], "lr": 0.0}, {"params": others}], lr=lr, momentum=0.9)


@pytest.mark.parametrize("prune", ["prunetrain", "morphnet"])
def test_groups_that_are_not_trained_plan_nothing(prune: str) -> None:
    frozen = ("optimizer=custom", "optimizer._target_=test_strength.with_a_frozen_stem", "+optimizer.lr=0.05")
    common = (*(o for o in SMALL if not o.startswith("prune")), f"prune={prune}", "prune.start_epoch=1", "epochs=2")
    run, other = trained(*common, *frozen), trained(*common, "optimizer.lr=0.05", "optimizer.nesterov=false")
    weights = [r.methods["prune"].penalty_weight for r in (run, other)]
    assert weights[0] == pytest.approx(weights[1])


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.0, 0.9), weight_decay=0.0),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.0, 0.9), amsgrad=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01, betas=(0.0, 0.9), eps=1e-4),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_step_is_the_one_that_the_optimizer_takes(name: str) -> None:
    """Without an average of gradients, that is what it makes of the last gradient."""
    weights = [nn.Parameter(torch.randn(3, 2, 2, 2).double()) for _ in range(2)]
    optimizer = OPTIMIZERS[name]([{"params": weights[:1]}, {"params": weights[1:], "lr": 0.002}])
    for step in range(5):
        before = [weight.detach().clone() for weight in weights]
        for weight in weights:
            weight.grad = 0.3**step * torch.randn_like(weight)
        optimizer.step()
    for weight, old in zip(weights, before, strict=True):
        length = step_length(optimizer, weight)
        torch.testing.assert_close(
            (old - weight.detach()) / weight.grad, torch.as_tensor(length).expand_as(weight).double()
        )


@pytest.mark.parametrize("optimizer", [("optimizer=adamw",), LARS, RMSPROP])
@pytest.mark.parametrize("ratio", [("prune.lasso_ratio=0.99",), ("prune.lasso_ratio=30", PLANNED[0])])
def test_pruning_works_with_any_optimizer(
    optimizer: tuple[str, ...], ratio: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strength, "LARGEST_LOSS_SHARE", 0.999)  # six epochs do not shrink by less
    run = trained(*SMALL, *optimizer, *ratio)
    assert run.params < 0.9 * run.initial["params"]


@pytest.mark.parametrize(
    ("optimizer", "regulariser"), [("adamw", "gamma_l1"), ("adamw", "group_lasso"), ("lars", "group_lasso")]
)
def test_morphnet_prunes_with_any_optimizer(optimizer: str, regulariser: str) -> None:
    ratio = ("prune.lasso_ratio=0.99", "prune.lasso_ratio_of=loss", f"prune.regulariser={regulariser}")
    run = trained(*MORPHNET, "prune.interval=1", "prune.start_epoch=2", f"optimizer={optimizer}", *ratio)
    assert run.params < 0.9 * run.initial["params"]


def test_an_optimizer_of_unknown_steps_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    trained(*SMALL, *SIGNUM)
    (line,) = [line for line in warnings(caplog) if "Signum" in line]
    assert line.startswith("optimizer=custom: ") and "step_size" in line and "prune.lasso_ratio" in line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("prune.lasso_ratio=0.1", PLANNED[0]), ["prune.lasso_ratio=0.1: by epoch 6, ", "; prune.lasso_ratio=0."]),
        (("prune.lasso_ratio=1e-4", "optimizer=adamw"), ["prune.lasso_ratio=0.0001: by epoch 6, "]),
        (("prune.lasso_ratio=0.1", PLANNED[0], "prune.stop_epoch=4", "prune.interval=2"), ["by epoch 4, "]),
    ],
)
def test_a_penalty_that_cannot_reach_zero_is_warned_of_early_and_late(
    options: tuple[str, ...], said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    run = trained(*SMALL, *options)
    early, late = warnings(caplog)
    assert all(part in early for part in said)
    assert "nothing was removed" in late and late.startswith("prune.lasso_ratio=")
    enough = early.rpartition("prune.lasso_ratio=")[2].split()[0]
    caplog.clear()
    trained(*SMALL, *options, f"prune.lasso_ratio={enough}")
    assert not any(line.startswith(f"prune.lasso_ratio={enough}: by epoch") for line in warnings(caplog))
    assert run.params == run.initial["params"]


def test_morphnet_warns_too(caplog: pytest.LogCaptureFixture) -> None:
    trained(*MORPHNET, "prune.strength=1e-30", "prune.lasso_ratio=null", "prune.start_epoch=2")
    early, late = warnings(caplog)
    assert early.startswith("prune.strength=1e-30: by epoch 2, ") and "; prune.strength=" in early
    assert "nothing was removed" in late


def test_a_run_that_shrinks_and_learns_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    run = trained(*SMALL, "epochs=10")
    assert run.params < run.initial["params"]
    assert warnings(caplog) == []


def test_an_accuracy_of_guessing_is_warned_of_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strength, "LARGEST_LOSS_SHARE", 0.999)
    run = trained(*SMALL, PLANNED[0], "prune.lasso_ratio=200")
    assert run.train_accuracy < 0.2
    (line,) = (line for line in warnings(caplog) if "guessing" in line)
    assert line.startswith("prune.lasso_ratio=200: a training accuracy of 0.")
    left = float(line.partition(" % of the parameters left")[0].rpartition(" ")[2])
    assert left == pytest.approx(100 * run.params / run.initial["params"], abs=0.1), "after what was removed"


def test_a_checkpoint_that_names_no_ratio_goes_on_with_the_papers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = morphtrain.compose(*SMALL, "epochs=3")
    asdict, state_dict = checkpoint.asdict, prunetrain.PruneTrain.state_dict

    def older(thing: Any) -> dict[str, Any]:
        facts = asdict(thing)
        facts.get("prune", {}).pop("lasso_ratio_of", None)
        return facts

    def older_state(method: prunetrain.PruneTrain) -> dict[str, Any]:
        return {"strength": state_dict(method)["strength"]}

    run = build_run(config)
    start(run)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "asdict", older)
        patch.setattr(prunetrain.PruneTrain, "state_dict", older_state)
        for _ in range(2):
            begin_epoch(run)
            train_epoch(run)
            finish_epoch(run)
        checkpoint.save(run, tmp_path, None)
    stored = checkpoint.Checkpoint(tmp_path / checkpoint.LAST)
    with pytest.raises(
        UserError, match=r"prune\.lasso_ratio_of=initial_norm: .*written with prune\.lasso_ratio_of=loss"
    ):
        stored.restore(morphtrain.compose(*SMALL, "epochs=3", PLANNED[0]))
    resumed = stored.restore(config)
    start(resumed)
    for either in (run, resumed):
        begin_epoch(either)
        train_epoch(either)
        finish_epoch(either)
    for a, b in zip(run.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
