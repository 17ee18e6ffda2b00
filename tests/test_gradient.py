"""Cheaper gradients in runs: in which steps, with what, and to the same bits after a resume."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL
from test_approximate import LAST, SIGMAS, draw, passed
from test_layer_calls import Scaled
from test_resume import assert_same
from torch import nn
from whole_runs import trained_to_the_end

import morphtrain
from morphtrain.errors import UserError
from morphtrain.gradient import ApproximateGradients, SparseGradients
from morphtrain.gradient.approximate import Approximate
from morphtrain.method import Closure, Method
from morphtrain.model import ResNet
from morphtrain.state import Run, derived_seed
from morphtrain.trainer import begin_epoch, build_run, checkpoint, finish_epoch, start, train_epoch
from morphtrain.trainer.checkpoint import Checkpoint

DENSE = [override for override in SMALL if not override.startswith("prune")]
PLAIN = (*DENSE, "tracking=none", "device=cpu")
METHODS = {
    "zero": ("gradient=approximate", "gradient.kind=zero"),
    "top1": ("gradient=approximate", "gradient.kind=top1"),
    "random": ("gradient=approximate", "gradient.kind=random"),
    "sparse": ("gradient=sparse_activation",),
}


def test_the_penalty_finds_gradients_to_add_to() -> None:
    """With `prune.update=subgradient` it pulls in all steps, as it does on weights that have a gradient."""
    run = run_of(*SMALL, "prune.update=subgradient", "prune.start_epoch=1", *METHODS["zero"], "gradient.share=1")
    seen = watched(run)
    train_epoch(run)
    assert all(grad.any() for step in seen[1:] for grad in step.values()), "the first one settles the strength"


@pytest.mark.parametrize("order", [["zero", "sparse"], ["sparse", "zero"]], ids="-".join)
def test_both_methods_and_modes_of_ones_own_nest_in_any_order(order: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 4, 3, bias=False)).double()
    x, sparse = draw(4, 3, 9, 9), SparseGradients(0.9)
    contexts = {"zero": ApproximateGradients("zero"), "sparse": sparse}
    with Scaled(2.0), contexts[order[0]], contexts[order[1]], Scaled(3.0):
        y = model(x)
    torch.testing.assert_close(y, 36 * model(x))
    y.sum().backward()
    assert not model[1].weight.grad.any() and model[0].weight.grad.any()
    assert sparse.tally.entries == y.numel() + 4 * 4 * 7 * 7
    assert sparse.tally.shares()[0] > 0


def run_of(*overrides: str) -> Run:
    """A run in its first epoch."""
    run = build_run(morphtrain.compose("tracking=none", "device=cpu", *overrides))
    start(run)
    begin_epoch(run)
    return run


def trained(*overrides: str) -> Run:
    """A run after its first epoch."""
    return advanced(build_run(morphtrain.compose("tracking=none", "device=cpu", *overrides)), 1)


def watched(run: Run) -> list[dict[str, torch.Tensor]]:
    """The gradients of all steps that the optimizer takes from now on: those of kernels larger than 1."""
    seen: list[dict[str, torch.Tensor]] = []
    kernels = {name: p for name, p in run.model.named_parameters() if p.dim() == 4 and p.shape[2] > 1}

    def look(*_: Any) -> None:
        seen.append({name: p.grad.clone() for name, p in kernels.items()})

    run.optimizer.register_step_pre_hook(look)
    return seen


def test_it_is_so_in_a_share_of_the_batches_and_the_record_says_in_how_many() -> None:
    options = ("data.train_samples=1600", "batch_policy.batch_size=8", "model.blocks=1", "gradient.share=0.3")
    run = run_of(*PLAIN, *options, *METHODS["zero"])
    seen = watched(run)
    train_epoch(run)
    record = finish_epoch(run)
    left_out = [[name for name, grad in step.items() if not grad.any()] for step in seen]
    number = sum(map(bool, left_out))
    assert len(seen) == 200
    assert abs(number - 60) < SIGMAS * math.sqrt(200 * 0.3 * 0.7)
    assert record["approximated_share"] == number / 200
    kernels = list(seen[0])
    assert {tuple(names) for names in left_out} == {(), tuple(kernels[1::2])}, "of the layers in the order of calls"


class Twice(Method):
    """Computes the gradients of every step three times, as methods that take the step do."""

    def __init__(self) -> None:
        self.seen: list[set[bool]] = []

    def step(self, run: Run, closure: Closure) -> bool:
        kernels = [p for p in run.model.parameters() if p.dim() == 4 and p.shape[2] > 1]
        found = {bool(kernels[1].grad.any())}  # type: ignore[union-attr]
        for _ in range(2):
            closure()
            found.add(bool(kernels[1].grad.any()))  # type: ignore[union-attr]
        self.seen.append(found)
        run.optimizer.step()
        return True


def test_it_is_drawn_for_a_step_and_not_for_its_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    approximated: list[bool] = []
    original = Approximate.around_forward

    def noted(self: Approximate, run: Run) -> AbstractContextManager[Any]:
        context = original(self, run)
        approximated.append(isinstance(context, ApproximateGradients))
        return context

    monkeypatch.setattr(Approximate, "around_forward", noted)
    own = ("methods=[{_target_: test_gradient.Twice}]", "batch_policy.max_micro_batch=4")
    run = run_of(*PLAIN, *METHODS["zero"], *own)
    twice = run.methods["methods.0"]
    assert isinstance(twice, Twice)
    train_epoch(run)
    passes = 4 * 3  # in a step
    assert len(approximated) == 16 * passes
    steps = [set(approximated[first : first + passes]) for first in range(0, len(approximated), passes)]
    assert sorted(map(list, {frozenset(step) for step in steps})) == [[False], [True]]
    assert [{not each for each in step} for step in steps] == twice.seen


def test_random_numbers_are_the_methods_own() -> None:
    """What data, weights and dropout draw is as without it; each epoch has others."""
    seeds = [derived_seed(1, epoch, *stream) for epoch in (1, 2) for stream in ((), (1,))]
    assert len(set(seeds)) == 4
    sequence = np.random.SeedSequence((3, 7)).generate_state(1, np.uint64)[0]
    assert derived_seed(3, 7) == int(sequence >> 1), "the one that runs have had before"
    states = []
    for options in ((), METHODS["random"], METHODS["sparse"]):
        trained(*PLAIN, *options, "epochs=1")
        states.append(torch.random.get_rng_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


def test_none_adds_nothing_to_a_run() -> None:
    run = run_of(*PLAIN)
    assert "gradient" not in run.methods and not run.hooks("around_forward")


@pytest.mark.parametrize("method", METHODS)
def test_resumed_amid_pruning_and_growth_it_ends_in_the_same_bits(method: str, tmp_path: Path) -> None:
    """The layers that are chosen after a block was inserted or removed are those of the new order."""
    options = (*SMALL, "tracking=none", "device=cpu", "epochs=4", *METHODS[method])
    changes = ("prune.start_epoch=1", "grow=deeper", "grow.at_epochs=[2]")
    config = morphtrain.compose(*options, *changes, "precision=bf16", "memory_format=channels_last")
    whole, half = advanced(build_run(config), 4), advanced(build_run(config), 2)
    checkpoint.save(half, tmp_path, None)
    parts = advanced(Checkpoint(tmp_path / "last.pt").restore(config), 4)
    for part in ("model", "optimizer"):
        assert_same(getattr(whole, part).state_dict(), getattr(parts, part).state_dict())
    events = " ".join(change["event"] for change in whole.changes)
    assert "inserted blocks" in events and "removed" in events
    for metric in config.gradient.metrics:
        assert all(0 < record[metric] <= 1 for record in whole.history)
        assert [record[metric] for record in whole.history] == [record[metric] for record in parts.history]


def advanced(run: Run, epochs: int) -> Run:
    """A built or restored run after so many epochs."""
    start(run)
    while run.epoch < epochs:
        begin_epoch(run)
        train_epoch(run)
        finish_epoch(run)
    return run


def test_a_run_records_zeros_and_savings_of_each_epoch() -> None:
    run = trained(*PLAIN, *METHODS["sparse"], "epochs=1")
    (record,) = run.history
    assert 0.3 < record["gradient_macs_saved"] < record["gradient_zeros"] < 0.9, "the head stays as it is"
    assert {"gradient_zeros", "gradient_macs_saved"} < set(run.config.recorded)


# -- in a config ------------------------------------------------------------------------------------------------------

SHARES = "must be above 0 and at most 1, as a share of the batches"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["gradient=approximate", "gradient.kind=top2"], "gradient.kind=top2: must be one of zero, top1, random"),
        (["gradient=approximate", "gradient.share=0"], f"gradient.share=0.0: {SHARES}"),
        (["gradient=approximate", "gradient.share=1.1"], f"gradient.share=1.1: {SHARES}"),
        (["gradient=approximate", "gradient.every=0"], "gradient.every=0: must be 1 or more; 1 is every convolution"),
        (
            ["gradient=sparse_activation", "gradient.p=1"],
            "gradient.p=1.0: must be above 0 and below 1, as a share of the gradients",
        ),
        (
            ["gradient=sparse_activation", "compile=default"],
            "gradient=sparse_activation with compile=default: compiled passes break off at every convolution; "
            "compile=none works",
        ),
        (
            ["gradient=approximate", "gradient.kind=random", "compile=max"],
            "gradient.kind=random with compile=max: compiled passes break off at every convolution; "
            "gradient.kind=top1 works",
        ),
        (
            ["gradient=approximate", "optimizer=lars"],
            "gradient.kind=zero with optimizer=lars: its trust ratios divide by gradients; where these are zero, "
            "weights decay at the whole learning rate; gradient.kind=top1 works",
        ),
        (
            ["gradient=approximate", "prune=early", "prune.importance=taylor"],
            "gradient=approximate with prune.importance=taylor: channels are measured by gradients of weights, which "
            "are not those of the loss then; prune.importance=magnitude works",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as refused:
        morphtrain.compose(*overrides)
    assert str(refused.value) == said
    works = said.rpartition("; ")[2].removesuffix(" works")
    if " with " in said:
        morphtrain.compose(*(o for o in overrides if o.split("=")[0] != works.split("=")[0]), works)


class Short(nn.Module):
    """A network of a few convolutions.

    Args:
        kernels: of the convolutions.
        frozen: the numbers of those that are, from 0.
    """

    def __init__(
        self, num_classes: int, in_channels: int, kernels: Sequence[int] = (1,), frozen: Sequence[int] = ()
    ) -> None:
        super().__init__()
        widths = [in_channels, *[4] * len(kernels)]
        self.body = nn.Sequential(*(nn.Conv2d(*pair, k) for *pair, k in zip(widths, widths[1:], kernels, strict=False)))
        for number in frozen:
            self.body[number].requires_grad_(False)
        self.head = nn.Linear(4, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Linear(nn.Module):
    """A network without convolutions."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.head = nn.Linear(in_channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.mean((2, 3)))


SHARED = (*(override for override in PLAIN if not override.startswith("model")), "model=custom")
SHORT = "model._target_=test_gradient.Short"
FEWER = "gradient.every=2: the network calls fewer convolutions with a kernel above 1"
FROZEN = "gradient=approximate: all convolutions with a kernel above 1 are frozen, .*; gradient=none works$"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([SHORT, *METHODS["zero"]], FEWER),
        ([SHORT, "+model.kernels=[3]", *METHODS["top1"], "gradient.share=1"], FEWER),
        ([SHORT, "+model.kernels=[3,3]", "+model.frozen=[0,1]", *METHODS["zero"]], FROZEN),
        ([SHORT, "+model.kernels=[3,1]", "+model.frozen=[0]", *METHODS["zero"]], FROZEN),
        (
            [SHORT, "+model.kernels=[3,3,3]", "+model.frozen=[1]", *METHODS["random"]],
            r"gradient\.every=2: all convolutions that it chooses are frozen; gradient\.every=1 works$",
        ),
        (["model._target_=test_gradient.Linear", *METHODS["sparse"]], "gradient=sparse_activation: the network has no"),
        ([SHORT, "+model.frozen=[0]", *METHODS["sparse"]], "gradient=sparse_activation: the network has no"),
    ],
)
def test_a_network_without_such_layers_is_refused_in_the_first_epoch(options: list[str], said: str) -> None:
    with pytest.raises(UserError, match=f"^{said}") as refused:
        trained(*SHARED, *options)
    assert "\n" not in str(refused.value)


def test_it_is_refused_in_whichever_epoch_it_would_have_acted_first() -> None:
    few = (*SHARED, "gradient.share=0.02", "data.train_samples=32", "epochs=40")
    run = build_run(morphtrain.compose(*few, SHORT, *METHODS["zero"][:1]))
    with pytest.raises(UserError, match=FEWER):
        advanced(run, 40)
    assert run.epoch > 1


class Freezes(Method):
    """Changes the network after the first epoch: no convolution learns any more, as if pruning had removed them."""

    def after_epoch(self, run: Run) -> None:
        if run.epoch == 1:
            run.model.body.requires_grad_(False)  # type: ignore[union-attr, operator]
            run.shape_changed("frozen")


def test_a_change_that_leaves_nothing_to_approximate_is_recorded_and_no_mistake() -> None:
    own = (SHORT, "+model.kernels=[3,3]", "methods=[{_target_: test_gradient.Freezes}]", "gradient.share=1")
    run = advanced(build_run(morphtrain.compose(*SHARED, *METHODS["zero"], *own, "epochs=2")), 2)
    assert [record["approximated_share"] for record in run.history] == [1.0, 0.0]


class Halved(Method):
    """A gradient method of one's own."""

    def after_backward(self, run: Run) -> None:
        for parameter in run.model.parameters():
            if parameter.grad is not None:
                parameter.grad /= 2


def test_a_method_of_ones_own_takes_the_groups_place() -> None:
    plain = ("optimizer.momentum=0", "optimizer.nesterov=false", "optimizer.weight_decay=0", "epochs=1")
    halved = trained(*PLAIN, *plain, "gradient=custom", "gradient._target_=test_gradient.Halved")
    slower = trained(*PLAIN, *plain, "optimizer.lr=0.05")
    torch.testing.assert_close(halved.model.state_dict(), slower.model.state_dict())


def test_both_can_be_had_in_one_run() -> None:
    listed = "methods=[{_target_: morphtrain.options.method, option: gradient/sparse_activation, p: 0.5}]"
    record = trained(*PLAIN, *METHODS["zero"], listed, "epochs=1").history[-1]
    assert record["approximated_share"] > 0 and record["gradient_zeros"] > 0.1


def test_a_checkpoint_from_before_there_was_the_group_goes_on(tmp_path: Path) -> None:
    config = morphtrain.compose(*PLAIN, "epochs=2")
    checkpoint.save(advanced(build_run(config), 1), tmp_path, None)
    stored = Checkpoint(tmp_path / "last.pt")
    del stored.facts["config"]["gradient"]
    assert stored.restore(config).epoch == 1
    own = ("gradient=custom", "gradient._target_=test_gradient.Halved")
    for options, name in ((METHODS["zero"], "approximate"), (own, "custom")):
        with pytest.raises(UserError, match=f"^gradient={name}: .* was written with gradient=none; resume"):
            stored.restore(morphtrain.compose(*PLAIN, "epochs=2", *options))


def test_a_network_learns_from_them() -> None:
    options = ("data=digits", "model.width=8", "tracking=none", "device=cpu", "epochs=3")
    for method in ("zero", "sparse"):
        run = trained_to_the_end(morphtrain.compose(*options, *METHODS[method]))
        assert run.history[-1]["val_accuracy"] > 0.8, method


def test_a_resnet_has_its_gradients_in_the_formats_of_its_weights() -> None:
    torch.manual_seed(0)
    model = ResNet(blocks=1, width=4).to(memory_format=LAST)
    x = draw(4, 3, 8, 8, dtype=torch.float32).to(memory_format=LAST)
    for context in (ApproximateGradients("top1"), ApproximateGradients("zero"), SparseGradients(0.9)):
        _, dx, grads = passed(model, x, context)
        assert dx.is_contiguous(memory_format=LAST)
        assert all(grads[name].stride() == p.stride() for name, p in model.named_parameters())
