"""optimizer=isgd: the paper's extra steps, where they belong; data.order=cycle: the same batches in every epoch."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_host_sync import Reads
from test_image_folder import config as folder_config
from test_image_folder import noise, write
from test_infobatch import DATA
from test_memory_format import stop_after
from test_resume import assert_same, contents
from test_settling import epoch, run_of
from torch.nn import functional as F
from whole_runs import trained_to_the_end

import morphtrain
from morphtrain import compilation
from morphtrain.contracts import SelectableData
from morphtrain.data import image_folder
from morphtrain.errors import UserError
from morphtrain.method import Method
from morphtrain.optimizer.isgd import ISGD, LossQueue, Subproblem
from morphtrain.state import Run
from morphtrain.trainer import begin_epoch, checkpoint, stored_network
from morphtrain.trainer.loop import training_steps

BATCHES = 13  # of 200 images, the last of which has 8
SMALL = (
    *("data=synthetic", "data.train_samples=200", "data.val_samples=40", "data.image_size=8", "data.num_classes=4"),
    *("model.width=4", "batch_policy.batch_size=16", "epochs=4", "tracking=none", "device=cpu"),
)
CYCLE = (*SMALL, "data.order=cycle")
# Images that are nothing but noise, whose losses fall slowly: some are above the mean.
SLOW = ("data.noise=30", "optimizer.lr=0.005", "schedule=constant", "optimizer.zeta=30")
OFTEN = (*CYCLE, *SLOW, "optimizer=isgd", "optimizer.sigmas=0")
PRUNED = (
    *("prune=prunetrain", "prune.lasso_ratio=0.95", "prune.lasso_ratio_of=loss"),
    *("prune.start_epoch=1", "prune.interval=1"),
)


# The method by itself.


class Toy:
    """Half the squared residual of a linear system, over two parameters that have a learning rate each."""

    lrs = (0.02, 0.007)

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.a, self.b = 0.5 * rng.normal(size=(6, 5)), rng.normal(size=6)
        start = torch.from_numpy(rng.normal(size=5))
        self.weights = [torch.nn.Parameter(start[:3].clone()), torch.nn.Parameter(start[3:].view(1, 2).clone())]
        groups = [{"params": [w], "lr": lr} for w, lr in zip(self.weights, self.lrs, strict=True)]
        self.optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=0.3)

    def __call__(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        w = torch.cat([weight.flatten() for weight in self.weights])
        loss = 0.5 * (torch.from_numpy(self.a) @ w - torch.from_numpy(self.b)).square().sum()
        loss.backward()
        return loss.detach()

    def values(self) -> np.ndarray:
        return np.concatenate([w.detach().flatten().numpy() for w in self.weights])

    def by_hand(self, before: np.ndarray, limit: float, eps: float, zeta: float, stop: int) -> tuple[np.ndarray, int]:
        """The paper's steps from the weights as they are, and the passes that they take."""
        w, lr = self.values().copy(), np.repeat(self.lrs, (3, 2))
        for passes in range(1, stop + 1):
            residual = self.a @ w - self.b
            loss = 0.5 * residual @ residual
            if loss <= limit:
                return w, passes
            w = w - zeta * lr * ((loss - limit) * (self.a.T @ residual) + eps / 5 * (w - before))
        return w, stop


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("share", "eps", "zeta"), [(0.5, 0.1, 1.5), (0.9, 20.0, 1.5), (0.9, 0.0, 60.0)])
def test_extra_steps_are_those_of_the_paper(seed: int, share: float, eps: float, zeta: float) -> None:
    toy = Toy(seed)
    toy()
    toy.optimizer.step()  # there is a momentum, which must not take part
    for stop in (1, 3, 40):
        toy()
        before, subproblem = toy.values(), Subproblem(toy.optimizer, eps, zeta)
        toy.optimizer.step()
        own_step, state = toy.values(), copy.deepcopy(toy.optimizer.state_dict())
        limit = share * toy().item()
        expected, passes = toy.by_hand(before, limit, eps, zeta, stop)
        assert subproblem.solve(toy, torch.tensor(limit, dtype=torch.double), stop) == passes <= stop
        np.testing.assert_allclose(toy.values(), expected, rtol=1e-12, atol=1e-12)
        if passes < stop:
            assert toy() <= limit
        assert_same(toy.optimizer.state_dict(), state)
        assert not np.array_equal(toy.values(), own_step)


def test_they_end_below_the_limit_and_none_is_taken_there() -> None:
    toy = Toy(0)
    loss, values = toy(), toy.values()
    assert Subproblem(toy.optimizer).solve(toy, loss, 5) == 1
    np.testing.assert_array_equal(toy.values(), values)
    assert 1 < Subproblem(toy.optimizer, zeta=20).solve(toy, 0.95 * loss, 200) < 200
    assert toy() <= 0.95 * loss


def test_the_limit_is_that_of_the_losses_of_an_epoch() -> None:
    """Held against numpy; each loss is compared with those before it."""
    losses, queue, exceeded = np.random.default_rng(0).gamma(2.0, size=60).astype(np.float32), LossQueue(7, 1.5), []
    for number, loss in enumerate(losses):
        last = losses[max(0, number - 7) : number].astype(np.float64)
        limit = last.mean() + 1.5 * last.std() if len(last) == 7 else np.inf
        assert (queue.limit is None) == (number < 7)
        found = queue.exceeded_by(torch.tensor(loss))
        assert (found is not None) == (loss > limit)
        if found is not None:
            assert found.item() == pytest.approx(limit, rel=1e-6)
            exceeded.append(number)
    assert 2 < len(exceeded) < 20


# In a run.


def method_of(run: Run) -> ISGD:
    method = run.methods["optimizer"]
    assert isinstance(method, ISGD)
    return method


def accelerated(run: Run) -> list[float]:
    """How many batches of each epoch got extra steps."""
    return [record["accelerated_batches"] for record in run.history]


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """The losses that each batch with a high one had in its extra passes, and then the one after them."""
    found: list[list[float]] = []
    solve = Subproblem.solve

    def watched(self: Subproblem, closure: Callable[[], torch.Tensor], limit: torch.Tensor, stop: int) -> int:
        found.append([])

        def noted() -> torch.Tensor:
            loss = closure()
            found[-1].append(loss.item())
            return loss

        passes = solve(self, noted, limit, stop)
        noted()
        return passes

    monkeypatch.setattr(Subproblem, "solve", watched)
    return found


def test_from_the_second_epoch_on_batches_with_a_high_loss_get_a_lower_one(losses: list[list[float]]) -> None:
    run = trained_to_the_end(morphtrain.compose(*OFTEN))
    assert accelerated(run)[0] == run.history[0]["extra_passes"] == 0
    assert all(0 < number < BATCHES for number in accelerated(run)[1:])
    assert sum(accelerated(run)) == len(losses)
    assert sum(record["extra_passes"] for record in run.history) == sum(len(found) - 1 for found in losses)
    assert max(map(len, losses)) == 1 + 5, "of some batch all extra steps are taken"
    stepped = [found for found in losses if len(found) > 2]
    assert stepped and all(found[-1] < found[0] for found in stepped)
    assert run.config.recorded[-2:] == ("accelerated_batches", "extra_passes")


def test_without_a_high_loss_it_is_sgd_to_the_bit() -> None:
    """Momentum, decay, schedule: all that is not extra is the same."""
    isgd = trained_to_the_end(morphtrain.compose(*CYCLE, "optimizer=isgd", "optimizer.sigmas=1000"))
    sgd = trained_to_the_end(morphtrain.compose(*CYCLE))
    assert accelerated(isgd) == [0, 0, 0, 0]
    assert_same(dict(isgd.model.state_dict()), dict(sgd.model.state_dict()))
    assert_same(isgd.optimizer.state_dict(), sgd.optimizer.state_dict())


class Watch(Method):
    """Keeps the batch that is trained on."""

    def before_forward(self, run: Run, batch: Any) -> None:
        self.batch = batch


WATCHED = (*OFTEN, "methods=[{_target_: test_isgd.Watch}]")


@pytest.mark.parametrize(
    "options",
    [(), (*PRUNED, "prune.update=subgradient"), ("clip_norm=0.01",), ("batch_policy.max_micro_batch=5",)],
    ids=["plain", "penalty", "clipped", "passes"],
)
def test_their_gradient_is_that_of_the_batchs_loss_alone(
    options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(*WATCHED, *options)
    watch: Any = run.methods["methods.0"]
    checked: list[float] = []

    def solve(self: Subproblem, closure: Callable[[], torch.Tensor], *_: Any) -> int:
        images, labels = watch.batch
        twin, parts = copy.deepcopy(run.model), -(-len(labels) // (run.micro_batch or len(labels)))
        pieces = list(zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True))
        loss = torch.stack([F.cross_entropy(twin(x), y, reduction="sum") for x, y in pieces]).sum() / len(labels)
        expected = torch.autograd.grad(loss, list(twin.parameters()))
        norm = torch.cat([gradient.flatten() for gradient in expected]).norm()
        factor = 1.0 if run.config.clip_norm is None else min(1.0, run.config.clip_norm / norm.item())
        first = run.loss
        torch.testing.assert_close(closure(), loss.detach())
        assert run.loss is first, "that of the batch, before its step"
        for parameter, gradient in zip(run.model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, factor * gradient, rtol=1e-4, atol=1e-6)
        checked.append(factor)
        return 1

    monkeypatch.setattr(Subproblem, "solve", solve)
    while len(checked) < 2:
        epoch(run)
    assert (max(checked) < 1) == ("clip_norm=0.01" in options)


def test_running_statistics_see_a_batch_once(losses: list[list[float]]) -> None:
    run = run_of(*OFTEN)
    method = method_of(run)

    def step(run: Run, closure: Any) -> bool | None:
        before = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
        assert any("running_var" in name for name in before)
        taken = ISGD.step(method, run, closure)
        assert_same(dict(run.model.named_buffers()), before)
        return taken

    method.step = step  # type: ignore[method-assign]
    for _ in range(2):
        epoch(run)
    assert losses


RESUMED = {
    "plain": (),
    "pruned": (
        *("prune=early", "prune.by=0.5", "prune.cuts=2", "prune.round_to=1"),
        *("optimizer.fused=true", "precision=bf16", "memory_format=channels_last"),
    ),
    "grown": ("grow=wider", "grow.at_epochs=[1]", "grow.new_lr_factor=0.5", "data.progressive=0.5"),
}


@pytest.mark.parametrize("kind", RESUMED)
def test_resumed_it_ends_at_the_same_bits(kind: str, tmp_path: Path) -> None:
    """The queue is in the checkpoint: the epoch after it has extra steps."""
    for name, stops in (("whole", [4]), ("parts", [2, 4])):
        (tmp_path / name).mkdir()
        for number, last in enumerate(stops):
            resume = f"resume={'auto' if number else 'never'}"
            stop_after(last, morphtrain.compose(*OFTEN, *RESUMED[kind], resume), tmp_path / name)
    whole, parts = (contents(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert_same(parts, whole)
    history = whole["facts"]["history"]
    assert history[2]["accelerated_batches"] > 0, "a queue outlives what changes the structure"
    assert (kind == "plain") == (max(record["changed"] for record in history) == 0)


def test_batches_of_another_size_are_others_and_begin_anew() -> None:
    policy = ("batch_policy=adabatch", "batch_policy.every=2", "batch_policy.max_batch_size=32")
    run = trained_to_the_end(morphtrain.compose(*OFTEN, *policy, "batch_policy.factor=2", "epochs=4"))
    assert [record["batch_size"] for record in run.history] == [16, 16, 32, 32]
    assert accelerated(run)[0] == accelerated(run)[2] == 0 < accelerated(run)[1]
    queue = method_of(run).losses
    assert queue is not None and len(queue.losses) == 7 and queue.count == 14


def test_weights_that_are_drawn_again_begin_anew() -> None:
    grown = ("grow=morphnet", "grow.round_epochs=1", "grow.rounds=2", "grow.inherit=false", "prune.stop_epoch=2")
    run = trained_to_the_end(morphtrain.compose(*OFTEN, *PRUNED, *grown))
    assert accelerated(run)[:3] == [0, 0, 0]
    assert method_of(run).losses is not None


def test_only_the_decision_waits_for_the_device() -> None:
    run, found = run_of(*CYCLE, "optimizer=isgd", "optimizer.sigmas=1000"), []
    for _ in range(2):
        begin_epoch(run)
        steps = training_steps(run)
        next(steps)
        with Reads() as reads:
            for _ in range(BATCHES - 2):
                next(steps)
        found.append(reads.found)
        list(steps)
    assert found == [[], ["_local_scalar_dense"] * (BATCHES - 2)]


@pytest.mark.slow
def test_compiled_it_takes_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    plain, compiled = (trained_to_the_end(morphtrain.compose(*OFTEN, *more)) for more in ((), ("compile=default",)))
    assert accelerated(compiled) == accelerated(plain)
    assert_same(dict(compiled.model.state_dict()), dict(plain.model.state_dict()))


@pytest.mark.parametrize("order", ["shuffled", "cycle"])
def test_other_batches_in_every_epoch_are_warned_of(order: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run_of(*SMALL, "optimizer=isgd", f"data.order={order}")
    said = [record.getMessage() for record in caplog.records if "isgd" in record.getMessage()]
    assert len(said) == (order == "shuffled")
    assert all(line.endswith("data.order=cycle keeps them") and "\n" not in line for line in said)


# The order of the data.

OWN = (*SMALL[5:], "data=custom", "data._target_=test_infobatch.own", "data.order=cycle")
KINDS: dict[str, Callable[[Path], SelectableData]] = {
    **DATA,
    "workers": lambda root: image_folder.build(
        folder_config(write(root, noise([(24, 24)] * 8)), in_memory=False, num_workers=1)
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_epoch_has_the_batches_of_the_first_augmented_anew(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, asked = KINDS[kind](tmp_path), []
    of_rows = data.train_batches_of
    monkeypatch.setattr(data, "train_batches_of", lambda rows, *rest: asked.append(rows) or of_rows(rows, *rest))

    def images(run: Run, epoch: int) -> list[torch.Tensor]:
        run.data, run.batch_size, run.epoch = data, 3, epoch
        return [images for images, _ in run.all_batches()]

    run = run_of(*CYCLE)
    found = [images(run, epoch) for epoch in (1, 2, 3)]
    assert all(torch.equal(rows, asked[0]) for rows in asked)
    assert sorted(asked[0].tolist()) == list(range(8)) != asked[0].tolist()
    assert all(list(map(len, batches)) == [3, 3, 2] for batches in found)
    assert not torch.equal(torch.cat(found[0]), torch.cat(found[1]))
    assert not torch.equal(torch.cat(found[1]), torch.cat(found[2]))
    assert_same(images(run_of(*CYCLE), 2), found[1])
    assert_same(images(run_of(*SMALL), 1), found[0])
    images(run_of(*CYCLE, "seed=2"), 1)
    assert not torch.equal(asked[-1], asked[0])


class Labels(Method):
    """Notes the labels of an epoch, and its first images."""

    def before_epoch(self, run: Run) -> None:
        self.labels: list[torch.Tensor] = []
        self.settled = run.training_inputs(1)[0]

    def before_forward(self, run: Run, batch: Any) -> None:
        if not self.labels:
            assert torch.equal(batch[0], self.settled), "what is measured on an epoch's first images is on these"
        self.labels.append(batch[1])


@pytest.mark.parametrize("order", ["shuffled", "cycle"])
def test_a_run_goes_through_the_same_batches_again(order: str) -> None:
    run = run_of(*SMALL, f"data.order={order}", "methods=[{_target_: test_isgd.Labels}]")
    noted, found = run.methods["methods.0"], []
    for _ in range(2):
        epoch(run)
        found.append(torch.cat(noted.labels))  # type: ignore[attr-defined]
    assert torch.equal(*found) == (order == "cycle")
    assert torch.equal(*(labels.sort().values for labels in found))


def test_own_data_that_can_be_asked_for_images_are_cycled() -> None:
    run = run_of(*OWN, "+data.kind=staying")
    epoch(run)
    assert run.config.data.order == "cycle"
    assert run.config.data.arguments == {"kind": "staying"}  # type: ignore[union-attr]


NO_CHOICE = (
    "data.order=cycle: data=test_infobatch.own has no train_batches_of(rows, batch_size, generator) beside its "
    "train_batches, to give batches of chosen images (morphtrain.contracts.SelectableData); data.order=shuffled takes "
    "any data"
)
REFUSED = {
    "bare": ((*OWN, "+data.kind=bare"), NO_CHOICE),
    "own batches": ((*OWN, "+data.kind=negative"), NO_CHOICE),
    "sorted": (
        (*OWN, "+data.kind=sorted"),
        "data=test_infobatch.own: train_batches_of gives images in an order of its own; that of the rows it is asked "
        "for is needed",
    ),
    "other order": ((*SMALL, "data.order=sorted"), "data.order=sorted: must be one of shuffled, cycle"),
    "infobatch": (
        (*CYCLE, "data.infobatch=0.5"),
        "data.order=cycle with data.infobatch=0.5: InfoBatch leaves out other images in every epoch; data.infobatch=0 "
        "works",
    ),
    "own data and infobatch": (
        (*OWN, "+data.kind=staying", "data.infobatch=0.5"),
        "data.order=cycle with data.infobatch=0.5: InfoBatch leaves out other images in every epoch; data.infobatch=0 "
        "works",
    ),
    "isgd and infobatch": (
        (*SMALL, "optimizer=isgd", "data.infobatch=0.5"),
        "optimizer=isgd with data.infobatch=0.5: InfoBatch leaves out other images in every epoch; data.infobatch=0 "
        "works",
    ),
    "loss scale": (
        (*CYCLE, "optimizer=isgd", "precision=o1", "precision.dtype=float16"),
        "optimizer=isgd with precision.dtype=float16: its extra steps have no loss scale of their own; precision=bf16 "
        "works",
    ),
    "sigmas": (
        (*CYCLE, "optimizer=isgd", "optimizer.sigmas=-1"),
        "optimizer.sigmas=-1.0: must be 0 or more (Wang et al.: 3)",
    ),
    "stop": ((*CYCLE, "optimizer=isgd", "optimizer.stop=0"), "optimizer.stop=0: must be 1 or more steps"),
    "zeta": ((*CYCLE, "optimizer=isgd", "optimizer.zeta=0"), "optimizer.zeta=0.0: must be above 0"),
    "metric": ((*CYCLE, "objective=[extra_passes]"), "objective=extra_passes: no such metric; "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused_in_a_line(case: str) -> None:
    overrides, message = REFUSED[case]
    with pytest.raises(UserError) as refused:
        run_of(*overrides)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("precision", ["o1", "o2", "o3"])
def test_float16_that_the_device_chooses_is_refused_as_well(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"morphtrain.precision.{precision}.chosen_type", lambda name, device: torch.float16)  # a GPU
    monkeypatch.setattr("morphtrain.precision.autocast.slowdown", lambda device, dtype: 1.0)
    with pytest.raises(UserError, match=rf"^optimizer=isgd with precision={precision} in float16: its extra steps"):
        run_of(*CYCLE, "optimizer=isgd", f"precision={precision}")


def test_checkpoints_from_before_the_key_go_on_shuffled(tmp_path: Path) -> None:
    stop_after(1, morphtrain.compose(*SMALL), tmp_path)
    path = tmp_path / "last.pt"
    content = torch.load(path, weights_only=True)
    facts = json.loads(content["facts"])
    del facts["config"]["data"]["order"]
    torch.save({**content, "facts": json.dumps(facts), "format": stored_network.WITHOUT_DIGEST}, path)
    assert checkpoint.Checkpoint(path).restore(morphtrain.compose(*SMALL)).epoch == 1
    with pytest.raises(UserError, match=r"data\.order=cycle: .* was written with data\.order=shuffled"):
        checkpoint.Checkpoint(path).restore(morphtrain.compose(*CYCLE))
