"""MorphNet in the loop: its strength, what it removes first, and that what goes is not missed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import SMALL
from networks import assert_close, outputs
from torch import nn
from torch.nn import functional as F

import morphtrain
from morphtrain.cost import WidthCost, count_macs, latency, measured_cost
from morphtrain.errors import UserError
from morphtrain.morph import ChannelGraph, Space
from morphtrain.prune.bias_folding import fold_constants
from morphtrain.prune.channel_norms import ChannelNorms
from morphtrain.prune.morphnet import importance_of_all
from morphtrain.prune.reconfigure import reconfigure
from morphtrain.prune.rounding import Rounding
from morphtrain.state import Run
from morphtrain.trainer.build import build_run
from morphtrain.trainer.epoch import begin_epoch, finish_epoch, start
from morphtrain.trainer.loop import evaluate, train_epoch

WITHOUT_PRUNE = [override for override in SMALL if not override.startswith("prune")]


@pytest.fixture
def ready() -> Callable[..., Run]:
    """A run that is ready for its first epoch."""

    def make(*overrides: str) -> Run:
        run = build_run(morphtrain.compose("prune=morphnet", *overrides))
        start(run)
        run.epoch = 1
        return run

    return make


def first_loss(run: Run) -> float:
    model = copy.deepcopy(run.model).train()
    images, labels = next(run.data.train_batches(run.batch_size, run.generator(1)))
    with torch.no_grad():
        return F.cross_entropy(model(images), labels).item()


@pytest.mark.parametrize("target", ["flops", "model_size"])
def test_the_strength_gives_the_ratio_on_the_first_batch_and_stays(ready: Any, target: str) -> None:
    """All gammas are one at the start, so the penalty is the network's whole cost."""
    run = ready(*WITHOUT_PRUNE, "prune.lasso_ratio=0.3", "prune.lasso_ratio_of=loss", f"prune.cost={target}")
    weights = sum(p.numel() for p in run.model.parameters() if p.dim() > 1)
    cost = 2 * count_macs(run.model, run.data.input_shape) if target == "flops" else weights
    loss = first_loss(run)
    train_epoch(run)
    strength = run.methods["prune"].penalty_weight
    assert strength * cost / (loss + strength * cost) == pytest.approx(0.3, abs=1e-5)
    run.epoch = 2
    train_epoch(run)
    assert run.methods["prune"].penalty_weight == strength


def test_a_given_strength_is_used_unchanged(ready: Any) -> None:
    run = ready(*WITHOUT_PRUNE, "prune.strength=1e-7", "prune.lasso_ratio=null")
    train_epoch(run)
    assert run.methods["prune"].penalty_weight == 1e-7


def test_every_step_ends_with_the_proximal_step_until_stop_epoch(ready: Any) -> None:
    """After plain SGD a gamma of one member has lost lr / (1 - momentum) * strength * slope, or is zero."""
    options = (*WITHOUT_PRUNE, "prune.strength=1e-6", "prune.lasso_ratio=null", "prune.stop_epoch=5")
    run = ready(*options, "batch_policy.batch_size=256", "schedule.warmup_epochs=0")
    plain = ready(*options, "batch_policy.batch_size=256", "schedule.warmup_epochs=0")
    plain.model.load_state_dict(run.model.state_dict())
    plain.methods.clear()
    space = run.graph.space("stages.0.0.branch.0")
    slope = WidthCost(run.graph, "flops").coefficients({s: float(s.size) for s in run.graph.spaces})[space]
    for r in (run, plain):
        train_epoch(r)
    group = run.optimizer.param_groups[0]
    amount = group["lr"] / (1 - group["momentum"]) * 1e-6 * slope
    gamma, free = (r.model.stages[0][0].branch[1].weight.detach() for r in (run, plain))
    assert 0 < amount < free.max()
    torch.testing.assert_close(gamma, free.sign() * (free.abs() - amount).clamp(min=0))
    run.epoch = 6
    plain.model.load_state_dict(run.model.state_dict())
    plain.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    plain.epoch = 6
    for r in (run, plain):
        train_epoch(r)
    for a, b in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert run.hooks("after_epoch")[0](run)["lasso_ratio"] == 0.0


class EarlyAndLate(nn.Sequential):
    """Many positions and few weights first, few positions and many weights then."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(8)),
            *(nn.Conv2d(8, 64, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, 10)),
        )


@pytest.mark.parametrize(("target", "first", "last"), [("flops", "0", "4"), ("model_size", "4", "0")])
def test_what_costs_most_goes_first(target: Any, first: str, last: str) -> None:
    graph = ChannelGraph.trace(EarlyAndLate(), torch.zeros(1, 3, 32, 32))
    norms = ChannelNorms(graph, "gamma_l1")
    alive = norms.alive(1e-2)
    slopes = norms.per_channel(WidthCost(graph, target).coefficients(alive))
    for _ in range(100):
        norms.shrink(0.01 * slopes / slopes.max())
    assert norms.alive(1e-2)[graph.space(first)] == 0
    assert norms.alive(1e-2)[graph.space(last)] == alive[graph.space(last)]


class Constants(nn.Module):
    """Every way in which a layer absorbs a constant: a norm after it, a bias, groups, a sum, a flatten, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.branch = nn.Sequential(
            *(nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6), nn.SiLU()),
            *(nn.Conv2d(6, 6, 1, groups=6), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8)),
        )
        self.biased = nn.Sequential(nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12), nn.ReLU())
        self.grouped = nn.Sequential(nn.Conv2d(12, 8, 1, groups=2, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 6, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.twice = nn.Conv2d(6, 6, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(2))
        self.head = nn.Sequential(nn.MaxPool2d(4), nn.Flatten(), nn.Linear(6 * 4, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.branch(x))
        x = self.up(self.grouped(self.biased(x)))
        for norm in self.norms:
            x = torch.relu(norm(self.twice(x)))
        return self.head(x)


def constant_channels() -> tuple[nn.Module, torch.Tensor]:
    """A network whose norms have statistics and shifts of their own, in double precision, and an input."""
    model, x = Constants().double(), torch.randn(6, 3, 8, 8, dtype=torch.double)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
    for _ in range(200):  # the running statistics become those of this batch
        model.train()(x)
    return model, x


def kill(graph: ChannelGraph, regulariser: Any, choose: Callable[[Space], torch.Tensor]) -> dict[Space, torch.Tensor]:
    """Zero the members of chosen channels, and nothing else."""
    norms = ChannelNorms(graph, regulariser)
    dead = {space: choose(space) for space in norms.spaces}
    norms.clear(dead)
    return dead


@pytest.mark.parametrize("regulariser", ["gamma_l1", "group_lasso"])
def test_what_dead_channels_add_is_kept_when_they_go(regulariser: Any) -> None:
    model, x = constant_channels()
    graph = ChannelGraph.trace(model, x)
    dead = kill(graph, regulariser, lambda space: torch.arange(space.size) % 3 == 0)
    assert len(dead) >= 5
    for _ in range(200):
        model.train()(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = outputs(model, (x,))
    lost = copy.deepcopy(model)
    fold_constants(graph, x, dead)
    change = reconfigure(
        graph, threshold=1e-2, optimizer=optimizer, importance_of=lambda g: importance_of_all(g, regulariser)
    )
    assert set(change.widths) == {space.name for space in dead}
    assert_close(outputs(model, (x,)), before, 1e-6)
    reconfigure(ChannelGraph.trace(lost, x), threshold=1e-2, importance_of=lambda g: importance_of_all(g, regulariser))
    assert (outputs(lost, (x,))[1] - before[1]).abs().max() > 0.05 * before[1].abs().max(), "there was nothing to keep"


def test_a_branch_with_a_dead_space_goes_and_leaves_its_constant() -> None:
    model, x = constant_channels()
    graph = ChannelGraph.trace(model, x)
    inner = [space for space in graph.spaces if space.name.startswith("branch.0")]
    dead = kill(graph, "gamma_l1", lambda space: torch.full((space.size,), space in inner))
    dead = {space: dead[space] for space in inner}
    for _ in range(200):
        model.train()(x)
    before = outputs(model, (x,))
    fold_constants(graph, x, dead)
    change = reconfigure(graph, threshold=1e-2, importance_of=lambda g: importance_of_all(g, "gamma_l1"))
    assert change.removed_blocks == ["branch"]
    assert_close(outputs(model, (x,)), before, 1e-6)


def test_dead_channels_that_rounding_keeps_add_nothing_twice() -> None:
    model, x = constant_channels()
    graph = ChannelGraph.trace(model, x)
    dead = kill(graph, "gamma_l1", lambda space: torch.arange(space.size) < 3)
    for _ in range(200):
        model.train()(x)
    before = outputs(model, (x,))
    fold_constants(graph, x, dead)
    assert_close(outputs(model, (x,)), before, 1e-6)
    importance_of = functools.partial(importance_of_all, regulariser="gamma_l1")
    reconfigure(graph, threshold=1e-2, rounding=Rounding(multiple=4), importance_of=importance_of)
    assert_close(outputs(model, (x,)), before, 1e-6)
    assert model.stem[0].out_channels == 8
    assert model.biased[0].out_channels == 12


def test_folding_leaves_modes_hooks_and_live_channels_alone() -> None:
    model, x = constant_channels()
    model.train()
    model.stem.eval()
    graph = ChannelGraph.trace(model, x)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    fold_constants(graph, x, {space: torch.zeros(space.size, dtype=torch.bool) for space in graph.spaces})
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key


@pytest.fixture(scope="module")
def digits() -> Iterator[list[dict[str, float]]]:
    """ResNet-8 on the digits: metrics, and the accuracy before and after every reconfiguration."""
    overrides = ["prune=morphnet", "prune.interval=2", "prune.start_epoch=4", "prune.lasso_ratio=0.7", "epochs=14"]
    overrides.append("prune.lasso_ratio_of=loss")
    run = build_run(morphtrain.compose(*overrides))
    start(run)
    history = []
    while run.epoch < run.config.epochs:
        begin_epoch(run)
        train_epoch(run)
        before = evaluate(run)[1]
        record = finish_epoch(run)
        macs = record["macs"] / run.initial["macs"]
        changed = {"before": before, "after": record["val_accuracy"], "changed": float(bool(run.change)), "macs": macs}
        channels = sum(space.size for space in run.graph.spaces)
        history.append({**record, **changed, "channels": channels / run.initial["channels"]})
    yield history


def test_it_shrinks_and_keeps_learning(digits: list[dict[str, float]]) -> None:
    assert digits[-1]["macs"] < 0.6
    assert digits[-1]["after"] > 0.9
    assert digits[-1]["channel_density"] == digits[-1]["channels"] < 0.8


def test_a_removal_is_not_missed(digits: list[dict[str, float]]) -> None:
    removals = [record for record in digits if record["changed"]]
    assert len(removals) >= 2
    assert any(record["before"] > 0.6 for record in removals)
    for record in removals:  # without `fold_constants` it falls by 0.3 to 0.7
        assert record["after"] > record["before"] - 0.1


def test_without_norms_the_way_out_is_named(ready: Any) -> None:
    with pytest.raises(UserError, match=r"prune\.regulariser=group_lasso"):
        ready("model=vgg8", "model.batch_norm=false")
    run = ready("model=vgg8", "model.batch_norm=false", "prune.regulariser=group_lasso", "prune.start_epoch=1")
    assert run.methods["prune"].regulariser == "group_lasso"


def test_spaces_left_alone_are_reported(ready: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    ready("model=torchvision", "model.name=mobilenet_v3_small", "data=synthetic", "data.image_size=32")
    (line,) = [record.getMessage() for record in caplog.records if "left as wide" in record.getMessage()]
    assert "features.1.block.1.fc1" in line


def test_latency_is_priced_by_what_was_measured_and_resumes_with_it(ready: Any, monkeypatch: Any) -> None:
    options = (*WITHOUT_PRUNE, "prune.cost=latency", "prune.lasso_ratio=0.5")
    run = ready(*options)
    method = run.methods["prune"]
    assert method.latency, "measured before the first epoch, so that it is on the clock of the set-up"
    assert run.clock.seconds["setup_seconds"] > 0
    for number, kind in enumerate(method.latency):  # other prices than any measurement gives
        method.latency[kind] = [1e-6 * (1 + number), 0.0, 1e-5, 1.0]
    monkeypatch.setattr(latency, "fastest", None)  # nothing is measured from here on
    train_epoch(run)
    cost = measured_cost(run.graph, 16, known=dict(method.latency))
    fresh = cost.coefficients({s: float(s.size) for s in method.norms.spaces})
    wanted = method.norms.per_channel(fresh)
    torch.testing.assert_close(method.slopes, wanted, rtol=1e-5, atol=0.0)  # of the epoch's start, all alive
    again = build_run(run.config)
    again.methods["prune"].load_state_dict(method.state_dict())
    start(again)
    assert again.methods["prune"].latency == method.latency
    assert again.methods["prune"].penalty_weight == method.penalty_weight


def test_costs_by_the_roofline_of_an_earlier_version_are_refused(ready: Any) -> None:
    method = ready(*WITHOUT_PRUNE).methods["prune"]
    method.load_state_dict({"strength": 1.0, "roofline": None})
    assert method.latency == {}
    with pytest.raises(UserError, match=r"prune\.cost=latency: .*roofline.*resume=never"):
        method.load_state_dict({"strength": 1.0, "roofline": [1e10, 1e9]})


@pytest.mark.parametrize("regulariser", ["gamma_l1", "group_lasso"])
def test_after_a_reconfiguration_what_is_left_keeps_shrinking(ready: Any, regulariser: str) -> None:
    options = (
        f"prune.regulariser={regulariser}",
        "prune.start_epoch=1",
        "prune.interval=1",
        "prune.round_to=4",
        "model.shortcut=B",
    )
    run = ready(
        *WITHOUT_PRUNE, *options, "prune.gamma_threshold=0.05", "prune.strength=1e-30", "prune.lasso_ratio=null"
    )
    method = run.methods["prune"]
    train_epoch(run)
    for space in method.norms.spaces:  # dead but not zero; rounding keeps one of them, of eight or more channels
        for slot in space.slots:
            if slot.role != "consumes":
                slot.axis.module.weight.data[slot.start : slot.start + 5] *= 1e-3
    method.after_epoch(run)
    assert run.change
    assert sorted({space.size for space in run.graph.spaces}) == [4, 12, 28]
    for r in importance_of_all(run.graph, method.regulariser).values():
        assert ((r == 0) | (r >= 0.05)).all(), "what stays of the dead is zero, or it would be shifted"
    run.epoch += 1
    method.penalty_weight = 1.0
    train_epoch(run)
    assert not any(r.any() for r in importance_of_all(run.graph, method.regulariser).values())
