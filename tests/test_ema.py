"""Runs with averaged weights: what they are, what is evaluated, kept and loaded, and that training is as without."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Command, Kill
from ranks import in_ranks
from test_maxbatch import parsed
from test_memory import SHAPE, allocated_peak, run_of_one_step
from test_resume import assert_same, contents
from torch import nn

import morphtrain
from morphtrain import world
from morphtrain.batch_policy.fill_memory import memory_of
from morphtrain.cost import estimate_memory
from morphtrain.errors import UserError
from morphtrain.evidence.records import read_records
from morphtrain.export.__main__ import main as export
from morphtrain.method import Method
from morphtrain.processes.digest import check_replicas
from morphtrain.settling import settle, trained_norms
from morphtrain.state import Run
from morphtrain.trainer import begin_epoch, build_run, checkpoint, finish_epoch, new_run, start, train, train_epoch
from morphtrain.trainer.loop import evaluate
from morphtrain.trainer.max_batch_report import show_max_batch

QUIET = (*SMALL, "tracking=none", "device=cpu", "timing.reference=0", "model.width=4", "model.blocks=1")
QUIET += ("prune.threshold=0.3", "prune.min_channels=2")  # so that channels go at once
PLAIN = tuple(o for o in QUIET if not o.startswith("prune"))
GROWN = (*PLAIN, "grow=deeper", "grow.at_epochs=[1]")
CPU = torch.device("cpu")


def run_of(*overrides: str) -> Run:
    run = new_run(morphtrain.compose(*overrides), CPU)
    start(run)
    return run


def epoch(run: Run) -> dict[str, float]:
    begin_epoch(run)
    train_epoch(run)
    return finish_epoch(run)


def network_of_averages(run: Run) -> nn.Module:
    """By itself: a copy of the network with the averages as its weights, its norms settled on the same batches."""
    twin = copy.deepcopy(run.model)
    with torch.no_grad():
        for own, parameter in zip(twin.parameters(), run.model.parameters(), strict=True):
            own.copy_(run.averages.values[parameter])
    twin.train()
    settle(twin, trained_norms(twin), [images for images, _ in run.all_batches()][:8])
    return twin.eval()


def images_and_labels(run: Run, part: str = "val") -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(getattr(run.data, f"{part}_batches")())
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


# -- what they are --------------------------------------------------------------------------------------------------


class Watch(Method):
    """Notes how far the run is and what the weights are after each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, list[torch.Tensor]]] = []

    def after_step(self, run: Run) -> None:
        self.seen.append((run.progress, [parameter.detach().double() for parameter in run.model.parameters()]))


@pytest.mark.parametrize("more", [(), ("data.infobatch=0.5", "epochs=4")])
def test_they_are_the_weighted_mean_of_the_weights_of_all_steps(more: tuple[str, ...]) -> None:
    """Independently, in double precision, with a batch size that grows: half of it is left after each half-life."""
    half_life, policy = 0.4, ("batch_policy=adabatch", "batch_policy.every=1", "batch_policy.max_batch_size=64")
    watch = "methods=[{_target_: test_ema.Watch}]"
    run = run_of(*PLAIN, *policy, watch, f"ema={half_life}", *more)
    for _ in range(3):
        epoch(run)
    seen = run.methods["methods.0"].seen
    assert len({round(b[0] - a[0], 6) for a, b in itertools.pairwise(seen)}) > 1, "steps of several sizes"
    weight, shares, before = 1.0, [], seen[-1][0]
    for progress, _ in reversed(seen):
        earlier = max((other for other, _ in seen if other < progress), default=0.0)
        left = 0.5 ** ((progress - earlier) / min(half_life, progress / 10))
        shares.append(weight * (1 - left if earlier else 1.0))
        weight *= left
    assert sum(shares) == pytest.approx(1, abs=1e-9) and before == pytest.approx(3)
    for number, parameter in enumerate(run.model.parameters()):
        mean = sum(share * weights[number] for share, (_, weights) in zip(shares, reversed(seen), strict=True))
        assert torch.allclose(run.averages.values[parameter].double(), mean, atol=1e-5)


@pytest.mark.parametrize("options", [(*QUIET, "epochs=4"), (*GROWN, "grow.start=half_half", "epochs=3")])
def test_training_is_as_without_them(options: tuple[str, ...]) -> None:
    """Bit for bit, through pruning and growth: whatever is measured and evaluated of them leaves no trace."""
    plain, with_them = run_of(*options), run_of(*options, "ema=0.5")
    for _ in range(plain.config.epochs):
        first, second = epoch(plain), epoch(with_them)
        assert second["raw_val_loss"] == first["val_loss"] and second["raw_val_accuracy"] == first["val_accuracy"]
        assert second["train_loss"] == first["train_loss"]
    assert len(plain.changes) > 1, "the structure has changed"
    assert_same(plain.model.state_dict(), with_them.model.state_dict())
    assert_same(plain.optimizer.state_dict(), with_them.optimizer.state_dict())
    assert with_them.averages.values.keys() == set(with_them.model.parameters())


def test_new_weights_begin_new_averages() -> None:
    run = run_of(*PLAIN, "ema=0.5")
    epoch(run)
    run.reset_weights()
    assert not run.averages.values and run.averages.since == run.progress == pytest.approx(1)
    begin_epoch(run)
    train_epoch(run)
    fresh = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    distance = sum((run.averages.values[p] - fresh[n]).norm() for n, p in run.model.named_parameters())
    assert 0 < distance < 0.2 * sum(value.norm() for value in fresh.values())


@pytest.mark.parametrize("precision", [["precision=o3"], ["precision=bf16_pure", "precision.rounding=stochastic"]])
def test_of_weights_of_16_bits_they_have_32(precision: list[str]) -> None:
    run = run_of(*QUIET, *precision, "ema=0.5", "epochs=2", "prune.start_epoch=1")
    for _ in range(2):
        epoch(run)
    short = [p for p in run.model.parameters() if p.dtype is torch.bfloat16]
    assert short and {value.dtype for value in run.averages.values.values()} == {torch.float32}
    assert any(not torch.equal(run.averages.values[p].bfloat16().float(), run.averages.values[p]) for p in short)


# -- what is evaluated ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [QUIET, (*PLAIN, "norm=weight", "clip_norm=1"), (*PLAIN, "norm=ghost")])
def test_what_is_evaluated_is_their_network(options: tuple[str, ...]) -> None:
    run = run_of(*options, "ema=0.5", "epochs=3")
    for _ in range(3):
        record = epoch(run)
    with torch.no_grad():
        for part in ("val", "test"):
            images, labels = images_and_labels(run, part)
            logits = network_of_averages(run)(images)
            assert record[f"{part}_loss"] == pytest.approx(run.criterion(logits, labels).item(), rel=1e-4)
            assert record[f"{part}_accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert evaluate(run) == (record["raw_val_loss"], record["raw_val_accuracy"])
    assert record["raw_val_loss"] != record["val_loss"]


def test_a_run_ends_by_their_accuracy(tmp_path: Path) -> None:
    train(morphtrain.compose(*PLAIN, "ema=0.5", "epochs=5"), tmp_path, {})
    accuracies = [record["val_accuracy"] for record in read_records(tmp_path)]
    again = tmp_path / "again"
    again.mkdir()
    keys = (f"stop_at={accuracies[1]}", "epochs=5", "objective=[raw_val_accuracy]")
    (raw,) = train(morphtrain.compose(*PLAIN, "ema=0.5", *keys), again, {})
    first = next(number for number, accuracy in enumerate(accuracies, 1) if accuracy >= accuracies[1])
    records = read_records(again)
    assert len(records) == first and records[-1]["raw_val_accuracy"] == raw


def test_wrong_values_are_named() -> None:
    for wrong in ("0", "-1", "inf", "often"):
        with pytest.raises(UserError, match=r"ema=.*: must be a"):
            morphtrain.compose(f"ema={wrong}")
    with pytest.raises(UserError, match="objective=raw_val_accuracy: no such metric"):
        morphtrain.compose("objective=[raw_val_accuracy]")
    assert set(morphtrain.compose("ema=1").recorded) - set(morphtrain.compose().recorded) == {
        "raw_val_loss",
        "raw_val_accuracy",
    }


# -- what is kept and loaded ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A run that was pruned, and its directory."""
    directory, run = tmp_path_factory.mktemp("trained"), run_of(*QUIET, "ema=0.5", "epochs=3")
    for _ in range(3):
        epoch(run)
    assert len(run.changes) > 1
    checkpoint.save(run, directory, None)
    return run, directory


def test_what_is_loaded_is_their_network_and_on_demand_the_other(trained: tuple[Run, Path]) -> None:
    run, directory = trained
    images, labels = images_and_labels(run)
    with torch.no_grad():
        raw, network = (morphtrain.load(directory / "last.pt", raw=raw)(images) for raw in (True, False))
        assert torch.equal(raw, run.model.eval()(images))
        assert torch.allclose(network, network_of_averages(run)(images), rtol=1e-4, atol=1e-5)
    loss = run.criterion(network, labels).item()
    assert run.history[-1]["val_loss"] == pytest.approx(loss, rel=1e-5) and not torch.allclose(raw, network)


def test_what_goes_on_from_the_file_goes_on_from_their_network(trained: tuple[Run, Path], tmp_path: Path) -> None:
    _, directory = trained
    network = morphtrain.load(directory / "last.pt")
    started = new_run(morphtrain.compose(*PLAIN, f"model.weights={directory / 'last.pt'}"), CPU)
    assert_same(started.model.state_dict(), network.state_dict())
    morphtrain.save(network, tmp_path / "saved.pt")
    assert_same(morphtrain.load(tmp_path / "saved.pt").state_dict(), network.state_dict())
    with pytest.raises(UserError, match=r"saved\.pt: holds no averages \(ema\)"):
        morphtrain.load(tmp_path / "saved.pt", raw=True)


def test_either_is_exported(trained: tuple[Run, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, directory = trained
    for raw, words in ((True, ["--raw"]), (False, [])):
        output = tmp_path / f"{raw}.state_dict.pt"
        assert export([str(directory / "last.pt"), "--format", "state_dict", "--output", str(output), *words]) == 0
        wanted = morphtrain.load(directory / "last.pt", raw=raw).state_dict()
        assert_same(torch.load(output, weights_only=True), wanted)


def test_in_32_bits_a_file_holds_each_average_once(trained: tuple[Run, Path]) -> None:
    _, directory = trained
    content = torch.load(directory / "last.pt", weights_only=True)
    assert content["averages"]["values"]
    for name, value in content["averages"]["values"].items():
        assert value.data_ptr() == content["model"][name].data_ptr() != content["raw"][name].data_ptr()


def test_a_file_whose_averages_are_damaged_is_refused(trained: tuple[Run, Path], tmp_path: Path) -> None:
    from test_checkpoint_file import changed

    run, directory = trained
    name = next(iter(run.model.state_dict()))
    damages = {
        "has no averages": lambda content, facts: content.pop("averages"),
        "has no raw": lambda content, facts: content.pop("raw"),
        "its averages do not fit": lambda content, facts: content["averages"]["values"].pop(name),
        "since is a str": lambda content, facts: content["averages"].update(since="then"),
    }
    for said, damage in damages.items():
        path = changed(directory / "last.pt", tmp_path / "damaged.pt", damage)
        with pytest.raises(UserError, match=said):
            checkpoint.Checkpoint(path).restore(run.config)
    with pytest.raises(UserError, match=r"ema=null: .* was written with ema=0\.5"):
        checkpoint.Checkpoint(directory / "last.pt").restore(morphtrain.compose(*QUIET, "epochs=3"))


def test_checkpoints_of_before_the_key_go_on(tmp_path: Path) -> None:
    config = morphtrain.compose(*PLAIN, "epochs=2")
    run = build_run(config)
    start(run)
    epoch(run)
    checkpoint.save(run, tmp_path, None)
    found = checkpoint.Checkpoint(tmp_path / "last.pt")
    assert not {"raw", "averages"} & found.content.keys()
    del found.facts["config"]["ema"]
    found.restore(config)
    with pytest.raises(UserError, match=r"ema=0\.5: .* was written with ema=null"):
        found.restore(morphtrain.compose(*PLAIN, "epochs=2", "ema=0.5"))


@pytest.mark.slow  # test_pairs.py resumes runs with every option
def test_killed_it_goes_on_to_the_same_averages(tmp_path: Path, command: Command, kill: Kill) -> None:
    grown = (*QUIET, "ema=0.5", "epochs=4", "grow=wider", "grow.at_epochs=[2]")
    assert command(*grown, "hydra.run.dir=once").returncode == 0
    kill("rename:4", *grown, "hydra.run.dir=twice")
    result = command(*grown, "hydra.run.dir=twice", "resume=auto")
    assert result.returncode == 0, result.stderr
    both = [contents(tmp_path / name / "last.pt") for name in ("once", "twice")]
    assert both[0]["averages"]["values"]
    assert_same(*both)


# -- several processes, memory --------------------------------------------------------------------------------------


def in_rank() -> tuple[list[dict[str, float]], bytes, str]:
    """The records and averages of a rank, and what is said if one of its averages has another last bit."""
    run = run_of(*PLAIN, "ema=0.5", "epochs=2", "norm=ghost")
    records = [epoch(run) for _ in range(2)]
    check_replicas(run)
    averages = torch.cat([value.flatten() for value in run.averages.values.values()])
    if world.rank() == 1:
        next(iter(run.averages.values.values())).view(torch.int32)[0] ^= 1
    with pytest.raises(UserError) as raised:
        check_replicas(run)
    return records, averages.numpy().tobytes(), str(raised.value)


def test_several_processes_have_the_same_averages() -> None:
    first, second = in_ranks(2, in_rank)
    assert first[:2] == second[:2]
    assert all("average: stem.0.weight is another one in rank 1" in said for _, _, said in (first, second))


@pytest.mark.parametrize("options", [["model=alexnet"], ["model=resnet20", "optimizer=adamw"]])
def test_the_memory_of_a_step_has_them(options: list[str], tmp_path: Path) -> None:
    run = run_of_one_step(2, *options, "ema=0.5")
    held = sum(4 * parameter.numel() for parameter in run.model.parameters())
    real = allocated_peak(run, tmp_path / "trace.json") + held  # they are there before the second step
    settings: dict[str, Any] = {"optimizer": run.optimizer}
    estimate, without = (estimate_memory(run.model, SHAPE, 2, **settings, averaged=one) for one in (True, False))
    assert estimate - without == held
    assert 0.96 < estimate / real < 1.03


def test_policies_and_the_largest_batch_count_them(capsys: pytest.CaptureFixture[str]) -> None:
    with_them, plain = (build_run(morphtrain.compose(*PLAIN, f"ema={ema}")) for ema in ("1", "null"))
    assert memory_of(with_them).fixed - memory_of(plain).fixed == pytest.approx(4 * plain.params)
    common = ("model=alexnet", "data=cifar10", "budget=64MiB", "throughput_seconds=0", "device=cpu")
    found = [show_max_batch(parsed(*common, *more), ["model"]) for more in ((), ("ema=1",))]
    assert found[1] < found[0]
    with pytest.raises(UserError, match=r"ema=0\.0: must be a half-life"):
        parsed(*common, "ema=0")


# -- with methods that change values beside the structure -----------------------------------------------------------


def test_constants_of_channels_that_go_stay_in_them() -> None:
    """MorphNet moves what a dead channel adds into the layer after it, here without a norm; in the averages, too."""
    network = ("model=vgg8", "model.width=4", "data.image_size=32", "data.train_samples=64")
    options = [o for o in PLAIN if not o.startswith(("model", "data.image_size", "data.train_samples"))]
    run = run_of(*options, *network, "prune=morphnet", "prune.start_epoch=1", "ema=0.5")
    begin_epoch(run)
    train_epoch(run)
    head = next(m for m in run.model.modules() if isinstance(m, nn.Linear))
    norm: Any = [m for m in run.model.modules() if isinstance(m, nn.BatchNorm2d)][-1]
    left = norm.num_features - 3
    assert norm.num_features == head.in_features
    with torch.no_grad():
        for tensors in ((norm.weight, norm.bias), (run.averages.values[norm.weight], run.averages.values[norm.bias])):
            tensors[0][:3], tensors[1][:3] = 0.0, torch.tensor([0.5, 1.0, 2.0])
    images, _ = images_and_labels(run)

    def outputs() -> torch.Tensor:
        run.settle_averages()
        with torch.no_grad(), run.averaged():
            return run.model.eval()(images)

    before = outputs()
    run.methods["prune"]._reconfigure(run)
    after = outputs()
    assert head.in_features == left and run.change
    assert torch.allclose(after, before, atol=1e-3 * before.abs().max().item())
