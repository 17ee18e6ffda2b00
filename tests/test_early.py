"""Early pruning: the target is reached, a cut changes nothing, nothing else is touched, and a killed run goes on."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Command, Kill
from networks import assert_close, outputs
from test_resume import assert_same, ends, train_here
from topologies import TOPOLOGIES
from torch import nn
from torch.nn import functional as F

import morphtrain
from morphtrain import schema
from morphtrain.compare.training import steps
from morphtrain.cost import WidthCost
from morphtrain.errors import UserError
from morphtrain.morph import NORMS, ChannelGraph
from morphtrain.prune import early
from morphtrain.prune.early import Early
from morphtrain.prune.early_bird import EarlyBird
from morphtrain.prune.fading import Fading
from morphtrain.state import Run
from morphtrain.trainer import checkpoint
from morphtrain.trainer.build import build_run
from morphtrain.trainer.epoch import begin_epoch, finish_epoch, start
from morphtrain.trainer.loop import train_epoch, training_steps

DATA = (
    "data=synthetic",
    "data.train_samples=64",
    "data.val_samples=32",
    "data.image_size=8",
    "batch_policy.batch_size=16",
)
EARLY = ("prune=early", "prune.cost=flops")
RESNET = (*DATA, "model=resnet8", "model.width=8", *EARLY, "prune.round_to=2")


class Dense(nn.Module):
    """Every layer reads all before it."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        widths = [16 + 8 * i for i in range(4)]
        self.stem, self.last = nn.Conv2d(in_channels, 16, 3, padding=1), nn.BatchNorm2d(widths[-1])
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[:-1])
        self.layers = nn.ModuleList(nn.Conv2d(width, 8, 3, padding=1, bias=False) for width in widths[:-1])
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = torch.cat([x, layer(norm(x).relu())], 1)
        return self.head(self.last(x).relu().mean((2, 3)))


class Odd(nn.Module):
    """A group norm, groups, PReLU, a squeeze and excitation, biases without norms, and a flatten."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem, self.norm, self.mix = nn.Conv2d(in_channels, 24, 3, padding=1), nn.GroupNorm(12, 24), conv(24, 32)
        self.grouped, self.prelu = nn.Conv2d(32, 32, 3, padding=1, groups=4), nn.PReLU(32)
        self.squeeze, self.excite = nn.Linear(32, 8), nn.Linear(8, 32)
        self.last, self.head = conv(32, 20), nn.Linear(20 * 16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.prelu(self.grouped(self.mix(self.norm(self.stem(x)).relu()).relu()))
        x = x * self.excite(self.squeeze(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None]
        return self.head(F.max_pool2d(self.last(x).relu(), 2).flatten(1))


def conv(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1)


NETWORKS = {
    "resnet8": ("model=resnet8", "model.width=16", "prune.round_to=4"),
    "vgg8": ("model=vgg8", "model.width=8", "prune.round_to=4"),
    "mobilenet_v2": ("model=mobilenet_v2", "model.width_multiplier=0.25", "prune.round_to=4"),
    "dense": ("model=custom", "model._target_=test_early.Dense", "prune.round_to=4"),
    "odd": ("model=custom", "model._target_=test_early.Odd", "prune.round_to=2"),
}


def started(*overrides: str) -> Run:
    run = build_run(morphtrain.compose(*overrides))
    start(run)
    return run


def advance(run: Run, epochs: int) -> Run:
    for _ in range(epochs):
        begin_epoch(run)
        train_epoch(run)
        finish_epoch(run)
    return run


def method_of(run: Run) -> Early:
    method = run.methods["prune"]
    assert isinstance(method, Early)
    return method


def at_the_end_of_the_first_cuts_epoch(run: Run) -> Run:
    """All of it is trained, and nothing is cut yet."""
    advance(run, method_of(run).cuts[0] - 1)
    begin_epoch(run)
    train_epoch(run)
    return run


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("target", "epochs", "by", "cuts", "seed"), [(0.75, 2, 0.5, 3, 1), (0.5, 5, 0.6, 2, 2), (0.25, 4, 0.75, 3, 3)]
)
def test_the_target_is_reached_by_its_epoch(
    network: str, target: float, epochs: int, by: float, cuts: int, seed: int
) -> None:
    """Within a step of the widths, whatever the network, the length and the seed; and nothing changes after it."""
    keys = (f"prune.target={target}", f"prune.by={by}", f"prune.cuts={cuts}", f"epochs={epochs}", f"seed={seed}")
    run = started(*DATA, *EARLY, *NETWORKS[network], *keys)
    first = WidthCost(run.graph, "flops")()
    advance(run, epochs)
    last, shares = math.floor(by * epochs), [record["cost_share"] for record in run.history]
    assert {record["epoch"] for record in run.history if record["changed"]} <= {*method_of(run).cuts}
    for epoch, share in enumerate(shares, 1):
        allowed = max((e for e in method_of(run).cuts if e <= epoch), default=0)
        assert share <= target ** (allowed / last) + 1e-9
    assert method_of(run).cuts[-1] == last < epochs
    cost, step = WidthCost(run.graph, "flops"), run.config.prune.round_to
    largest = max(cost({space: space.size + step}) for space in run.graph.spaces) - cost()
    assert target * first - largest < cost() <= target * first
    assert shares[-1] == pytest.approx(run.macs / run.initial["macs"])  # counted on the network itself
    assert all(axis.length % step == 0 for axis in run.graph.axes if axis.weight is not None and is_free(axis))


def is_free(axis: Any) -> bool:
    return all(segment.space is not None and segment.span == 1 for segment in axis.segments)


@pytest.mark.parametrize("cost", ["model_size", "latency"])
def test_other_costs_reach_their_target(cost: str) -> None:
    run = advance(started(*RESNET, f"prune.cost={cost}", "epochs=2", "prune.by=0.5", "prune.target=0.6"), 2)
    assert 0.4 < run.history[-1]["cost_share"] <= 0.6
    if cost == "model_size":
        first = sum(p.numel() for p in started(*RESNET).model.parameters() if p.dim() > 1)
        now = sum(p.numel() for p in run.model.parameters() if p.dim() > 1)
        assert run.history[-1]["cost_share"] == pytest.approx(now / first)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("prune.importance=taylor", "optimizer=adamw", "clip_norm=0.1"),
        ("prune.importance=gamma", "optimizer.lr=0.5", "model.shortcut=B", "memory_format=channels_last"),
        ("batch_policy=adabatch", "batch_policy.every=1", "batch_policy.max_batch_size=24"),
        ("model=custom", "model._target_=test_early.Odd"),
        ("model=custom", "model._target_=test_early.Dense"),
    ],
)
def test_what_goes_is_zero_in_the_end_so_a_cut_changes_nothing(options: tuple[str, ...]) -> None:
    base = DATA if "model=custom" in options else RESNET
    keys = (*EARLY, "prune.round_to=2", "epochs=5", "prune.by=0.8", "prune.cuts=2")
    run = at_the_end_of_the_first_cuts_epoch(started(*base, *keys, *options))
    fading = method_of(run).fading
    assert fading is not None
    assert fading.gone
    for space, mask in fading.gone.items():
        for slot in space.slots:
            rows = slot.start + mask.repeat_interleave(slot.segment.span).nonzero().flatten()
            for name, dim in slot.axis.tensors if slot.has_weights or isinstance(slot.axis.module, NORMS) else ():
                if name in ("weight", "bias"):
                    tensor = getattr(slot.axis.module, name)
                    assert tensor.index_select(dim, rows).count_nonzero() == 0, (space, slot.axis.path, name)
    assert sum(int(p.count_nonzero()) for p in run.model.parameters()) > 0.2 * run.params
    images = run.training_inputs(1)
    before, params = outputs(run.model, images), sum(p.numel() for p in run.model.parameters())
    method_of(run).after_epoch(run)
    assert_close(outputs(run.model, images), before, 1e-5)
    assert sum(p.numel() for p in run.model.parameters()) < params
    assert method_of(run).fading is None


@pytest.mark.parametrize("name", [name for name in TOPOLOGIES if name != "SeveralInputs"])  # which keeps its channels
def test_fading_touches_what_goes_and_nothing_else(name: str) -> None:
    """In any network: cut half-way, it equals one cut at the start; at the end, what it computes is what it did."""
    make, inputs = TOPOLOGIES[name]
    model, x = make().double(), inputs()
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.uniform_(p, 0.3, 1.0)
    graph = ChannelGraph.trace(model, x)
    gone = {space: torch.arange(space.size) % 3 == 1 for space in graph.spaces if space.size > 1}
    assert gone
    twin = copy.deepcopy(graph)
    twins = dict(zip(graph.spaces, twin.spaces, strict=True))
    twin.reindex_spaces({twins[space]: (~mask).nonzero().flatten() for space, mask in gone.items()})
    fading = Fading(graph, gone, left=2.0)
    whole = [p.detach().clone() for p in model.parameters()]
    fading.fade(0.5)
    assert all(((p == q) | (p == 0.25 * q)).all() for p, q in zip(model.parameters(), whole, strict=True))
    half = copy.deepcopy(fading)
    half.graph.reindex_spaces({s: (~mask).nonzero().flatten() for s, mask in half.gone.items()})
    for a, b in zip(half.graph.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(a, b)
    fading.fade(0.0)
    before = outputs(model, x)
    change = fading.cut(torch.optim.SGD(model.parameters(), lr=0.1))
    assert change.widths == {space.name: (len(mask), int((~mask).sum())) for space, mask in gone.items()}
    assert_close(outputs(model, x), before, 1e-9)


def test_steps_that_are_skipped_do_not_delay_a_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a loss scale that is too large at first: what is left is by the steps that are."""
    run = started(*RESNET, "epochs=5", "prune.by=0.8", "prune.cuts=2")
    step, skipped = run.precision.step, iter((False, False))
    monkeypatch.setattr(run.precision, "step", lambda optimizer: next(skipped, True) and step(optimizer))
    at_the_end_of_the_first_cuts_epoch(run)
    fading = method_of(run).fading
    assert run.progress == 1.5
    assert fading is not None
    assert fading.left == 0
    assert all(p[mask.expand_as(p)].count_nonzero() == 0 for p, mask in fading.masks.items())


@pytest.mark.parametrize("importance", ["magnitude", "gamma", "taylor"])
def test_if_all_steps_are_skipped_no_more_goes_than_is_to(importance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = started(*RESNET, "epochs=5", "prune.by=0.2", "prune.target=0.5", f"prune.importance={importance}")
    monkeypatch.setattr(run.precision, "step", lambda optimizer: False)
    begin_epoch(run)
    train_epoch(run)
    assert 0.35 < finish_epoch(run)["cost_share"] <= 0.5


def test_every_step_takes_an_equal_part_of_what_is_left() -> None:
    graph = ChannelGraph.trace(nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 2)), torch.zeros(1, 3, 8, 8))
    (space,) = [space for space in graph.spaces if space.size == 4]
    weight, gone = graph.model[0].weight, torch.tensor([True, False, False, True])
    fading, first = Fading(graph, {space: gone}, left=1.0), weight.detach().clone()
    for left in (0.75, 0.5, 0.25, 1e-12):
        fading.fade(left)
        torch.testing.assert_close(weight[gone], (left if left > 0.1 else 0.0) * first[gone], rtol=1e-6, atol=0)
        assert torch.equal(weight[~gone], first[~gone])
        if left == 0.5:
            weight.data.mul_(3)  # training may do what it likes
            first.mul_(3)


def one_step(run: Run, training: Any) -> None:
    assert next(training) == 16


def test_a_step_of_fading_is_the_step_that_training_takes_and_a_factor() -> None:
    """Before the choice the run is one without pruning; after it, what stays takes the steps that it would take."""
    keys = ("epochs=4", "prune.by=0.5", "prune.cuts=1")
    faded, left_alone = started(*RESNET, *keys), started(*RESNET, *keys)
    plain = started(*DATA, "model=resnet8", "model.width=8", "epochs=4")
    for run in (faded, left_alone, plain):
        advance(run, 1)
        begin_epoch(run)
    training = {id(run): training_steps(run) for run in (faded, left_alone, plain)}
    fading = method_of(faded).fading
    assert fading is not None, "chosen with the last step of the first of two epochs"
    for a, b in zip(faded.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)
    method_of(left_alone).fading = method_of(left_alone).cut = None
    for run in (faded, left_alone, plain):
        one_step(run, training[id(run)])
    marked = 0
    for a, b, c in zip(*(run.model.parameters() for run in (faded, left_alone, plain)), strict=True):
        mask = fading.masks.get(a, torch.tensor(False)).expand_as(a)
        assert torch.equal(b, c)
        assert torch.equal(a[~mask], b[~mask])
        torch.testing.assert_close(a[mask], b[mask] * 3 / 4)  # the first of four steps
        marked += int(mask.sum())
    assert marked > 100


def test_after_the_last_cut_it_trains_as_any_network() -> None:
    keys = ("epochs=4", "prune.by=0.5", "prune.cuts=2", "prune.importance=taylor")
    run, plain = (advance(started(*RESNET, *keys), 2) for _ in range(2))
    plain.methods.pop("prune")
    assert run.history[1]["changed"]
    advance(run, 2)
    advance(plain, 2)
    for a, b in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert_same(run.optimizer.state_dict(), plain.optimizer.state_dict())
    assert run.history[3]["val_loss"] == plain.history[3]["val_loss"]


def test_what_grows_meanwhile_is_cut_as_well() -> None:
    """A choice is made anew when others change the network."""
    grow = ("grow=wider", "grow.at_epochs=[2]", "grow.factor=1.5")
    run = started(*RESNET, *grow, "epochs=5", "prune.by=0.7", "prune.cuts=1", "prune.importance=taylor")
    advance(run, 2)
    assert run.history[-1]["cost_share"] > 1
    assert method_of(run).fading is None
    advance(run, 1)
    assert run.history[-1]["cost_share"] <= 0.5


def test_a_network_without_one_of_its_blocks_is_pruned_too() -> None:
    run = started(*RESNET, "epochs=3", "prune.by=0.4")
    run.graph.remove_block(run.graph.blocks[0], run.optimizer)
    run.shape_changed("removed a block")
    run.follow_change()
    run.count()
    advance(run, 3)
    assert run.history[-1]["cost_share"] <= 0.5


def test_the_steps_of_a_comparison_run_on() -> None:
    """They follow one another without what comes after an epoch."""
    run = started(*RESNET, "epochs=4", "prune.by=0.5")
    params = run.params
    assert len(list(steps(run))) == 16
    assert sum(p.numel() for p in run.model.parameters()) == params


@pytest.mark.parametrize("moment", ["step:20", "step:40"])
def test_killed_between_two_cuts_it_ends_the_same(moment: str, tmp_path: Path, command: Command, kill: Kill) -> None:
    """While it looks at gradients, and while channels fade; with the one as with the other in the checkpoint."""
    keys = (*EARLY, "prune.round_to=2", "prune.by=0.7", "prune.cuts=1", "prune.importance=taylor", "epochs=5")
    here = [*(override for override in SMALL if not override.startswith(("prune", "epochs"))), *keys, "tracking=none"]
    here.append("timing.reference=0")  # which takes steps of its own
    train_here(tmp_path / "once", *here)
    there = [*here, "hydra.run.dir=twice", "resume=auto"]
    kill(moment, *there)
    state = torch.load(tmp_path / "twice" / "last.pt", weights_only=True)["methods"]["prune"]
    assert (state["fading"] is not None, state["taylor"]["steps"] > 0) == (moment == "step:40", moment == "step:20")
    assert command(*there).returncode == 0
    once, twice = (ends(tmp_path / name) for name in ("once", "twice"))
    assert_same(once, twice)
    assert once["last"]["facts"]["history"][-1]["cost_share"] <= 0.5


def test_a_choice_has_settled_once_it_is_like_the_five_before() -> None:
    masks = torch.rand(40, generator=torch.Generator().manual_seed(0)) < 0.5
    bird, other = EarlyBird(most=0.1), masks.clone()
    other[:4] = ~other[:4]  # a tenth of them, which is not less than a tenth
    assert [bird.settled(masks) for _ in range(7)] == [False] * 5 + [True] * 2
    assert not bird.settled(other)
    assert [bird.settled(masks) for _ in range(6)] == [False] * 5 + [True], "until it is none of the last five"
    nearer = masks.clone()
    nearer[:3] = ~nearer[:3]
    assert bird.settled(nearer)


SETTLES = ("epochs=20", "prune.by=0.8", "prune.cuts=1", "prune.stable=0.1", "optimizer.lr=1e-6")


def test_a_cut_comes_sooner_where_the_choice_has_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that hardly move: after six epochs five choices are alike; where each is drawn, none are."""

    def drawn(graph: ChannelGraph) -> dict[Any, torch.Tensor]:
        return {space: torch.rand(space.size).double() for space in graph.spaces}

    for importance, cut in ((early.magnitude, 7), (drawn, 16)):
        monkeypatch.setattr(early, "magnitude", importance)
        run = advance(started(*RESNET, *SETTLES), 17)
        assert [int(record["epoch"]) for record in run.history if record["changed"]] == [cut]
        assert run.history[cut - 2]["cost_share"] == 1
        assert run.history[-1]["cost_share"] <= 0.5


@pytest.mark.parametrize("stops", [3, 6], ids=["while it compares", "once it has settled"])
def test_a_resumed_run_settles_on_the_same_epoch(stops: int, tmp_path: Path) -> None:
    config = morphtrain.compose(*RESNET, *SETTLES)
    whole = advance(started(*RESNET, *SETTLES), stops)
    checkpoint.save(whole, tmp_path, None)
    again = checkpoint.Checkpoint(tmp_path / checkpoint.LAST).restore(config)
    start(again)
    advance(whole, 8 - stops)
    advance(again, 8 - stops)
    assert whole.history[6]["changed"] == again.history[6]["changed"] == 1
    assert_same(again.model.state_dict(), whole.model.state_dict())


def test_cuts_are_spread_over_the_first_epochs() -> None:
    def cuts(epochs: int, by: float, number: int) -> list[int]:
        option = schema.prune.Early("early", 0.5, "flops", by, number, None, "magnitude", 8, 1, [])
        return option.cut_epochs(epochs)

    assert cuts(60, 0.2, 3) == [4, 8, 12]
    assert cuts(100, 0.29, 1) == [29]  # 28.999999999999996 in floating point
    assert cuts(20, 0.2, 3) == [2, 3, 4]
    assert cuts(20, 0.2, 99) == [1, 2, 3, 4]
    assert cuts(2, 0.99, 3) == [1]
    assert cuts(6, 0.1, 3) == [1], "shares of the run are an epoch at least"
    for epochs in range(2, 40):
        for by in (0.5, 0.7, 0.99):
            found = cuts(epochs, by, 3)
            assert found == sorted(set(found))
            assert 1 <= found[0] <= found[-1] == min(math.floor(round(by * epochs, 9)), epochs - 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["prune.target=50"],
            "prune.target=50.0: must be above 0 and below 1, as a share of the first",
        ),
        (["prune.target=1"], "prune.target=1.0: must be above 0 and below 1"),
        (["prune.by=5"], "prune.by=5.0: must be above 0 and below 1, as a share of the epochs"),
        (["prune.by=0"], "prune.by=0.0: must be above 0 and below 1"),
        (["prune.cuts=0"], "prune.cuts=0: must be 1 or more"),
        (["prune.stable=0.1"], "prune.cuts=3: must be 1 with prune.stable=0.1; or prune.stable=null"),
        (
            ["prune.stable=0", "prune.cuts=1"],
            "prune.stable=0.0: must be above 0 and below 1, as a share of the channels",
        ),
        (["prune.cost=watts"], "prune.cost=watts: must be one of flops, model_size, latency"),
        (["prune.importance=luck"], "prune.importance=luck: must be one of magnitude, gamma, taylor"),
        (["prune.round_to=0"], "prune.round_to=0: must be 1 or more channels"),
        (["epochs=1"], "epochs=1: must be 2 or more with prune=early"),
        (["grow=morphnet", "grow.rounds=1", "grow.round_epochs=2"], "prune.by=0.2: must be at most 0.03333"),
    ],
)
def test_mistakes_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        morphtrain.compose("prune=early", *overrides)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prune.target=0.02"], "prune.target=0.02: cannot be reached with prune.round_to=2 and prune.min_channels=1;"),
        (["prune.ignore=['*']"], "prune=early: the model has no channels that can go"),
        (
            ["model=torchvision", "model.name=squeezenet1_1", "data.image_size=32", "prune.importance=gamma"],
            "prune.importance=gamma: no channels of the model go through a norm with a scale;",
        ),
    ],
)
def test_what_cannot_be_done_is_said_before_the_first_epoch(overrides: list[str], message: str) -> None:
    keys = [key for key in RESNET if not (key == "model.width=8" and "model=torchvision" in overrides)]
    with pytest.raises(UserError) as refused:
        started(*keys, *overrides)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize("keys", [("prune.round_to=2",), ("prune.round_to=8",), ("prune.min_channels=7",)])
def test_a_target_out_of_reach_names_the_least_that_is_not(keys: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as refused:
        started(*RESNET, *keys, "prune.target=0.01", "epochs=2")
    (named,) = re.findall(r"; ([\d.]+|no target) can, and smaller values of these may allow less$", str(refused.value))
    if named == "no target":
        assert keys == ("prune.round_to=8",), "its first stage has 8 channels"
        return
    least = float(named)
    assert advance(started(*RESNET, *keys, f"prune.target={least}", "epochs=2"), 2).history[-1]["cost_share"] <= least
    with pytest.raises(UserError, match=f"; {named} can"):
        started(*RESNET, *keys, f"prune.target={0.98 * least}", "epochs=2")


def test_a_choice_after_training_has_diverged_says_so() -> None:
    run = started(*RESNET, "epochs=2", "prune.by=0.5")
    begin_epoch(run)
    for parameter in run.model.parameters():
        parameter.data.fill_(math.nan)
    lr = f"an optimizer.lr below {run.base_lrs[0]:g} may work"
    with pytest.raises(UserError, match=rf"^prune=early: importance of '.*': not a number \(nan\): .* diverged; {lr}$"):
        method_of(run).after_epoch(run)
