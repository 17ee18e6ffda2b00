"""What has grown has a learning rate of its own: exactly that, for nothing else, and through whatever follows."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from networks import OPTIMIZERS, build, step, trace
from test_grow_methods import GROWTHS, grow
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

import morphtrain
from morphtrain.errors import UserError
from morphtrain.grow.net2net import widen
from morphtrain.morph import ChannelGraph, Space, additions_of
from morphtrain.optimizer.lars import LARS
from morphtrain.prune.step_length import step_length
from morphtrain.trainer import checkpoint
from morphtrain.trainer.build import build_run
from morphtrain.trainer.checkpoint import Checkpoint
from morphtrain.trainer.epoch import begin_epoch, finish_epoch, start
from morphtrain.trainer.loop import train_epoch

OF_ALL_KINDS = {**OPTIMIZERS, "lars": lambda p: LARS(p, lr=10.0, nesterov=True, weight_decay=1e-3)}
X = torch.randn(4, 3, 6, 6, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def chain() -> nn.Sequential:
    """Two spaces, between which the second convolution lies."""
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1))
    return nn.Sequential(*layers, nn.Flatten()).double()


def train_a_step(model: nn.Module, optimizer: Optimizer) -> None:
    F.mse_loss(model(X), torch.zeros(4, 8, dtype=torch.double)).backward()
    optimizer.step()
    optimizer.zero_grad()


@contextmanager
def growth(optimizer: Optimizer, number: int) -> Iterator[None]:
    additions_of(optimizer).growth = number
    yield
    additions_of(optimizer).growth = 0


def spaces(graph: ChannelGraph) -> list[Space]:
    """That of the first convolution, and that of the second."""
    return sorted(graph.spaces, key=lambda space: space.name)


def expected(model: nn.Sequential, first: list[int], second: list[int]) -> dict[str, torch.Tensor]:
    """The growths of all entries, by those of the channels: the later of an entry's row and column."""
    rows, columns = torch.tensor(first), torch.tensor(second)
    return {
        "0.weight": rows.view(-1, 1, 1, 1).expand_as(model[0].weight),
        "0.bias": rows,
        "1.weight": rows,
        "1.bias": rows,
        "3.weight": torch.maximum(columns.view(-1, 1, 1, 1), rows.view(1, -1, 1, 1)).expand_as(model[3].weight),
        "3.bias": columns,
        "5.weight": columns.view(1, -1, 1, 1).expand_as(model[5].weight),
    }


def assert_numbers(model: nn.Module, optimizer: Optimizer, growths: dict[str, torch.Tensor]) -> None:
    numbers = additions_of(optimizer).numbers
    for name, parameter in model.named_parameters():
        found = numbers.get(parameter, torch.zeros_like(parameter))
        assert torch.equal(found.long(), growths.get(name, torch.zeros_like(parameter)).long()), name
    assert all(any(key is p for p in model.parameters()) for key in numbers), "of nothing that has gone"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_what_is_new_follows_all_that_comes_later(name: str, memory_format: torch.memory_format) -> None:
    model = chain().to(memory_format=memory_format)
    optimizer = OF_ALL_KINDS[name](model.parameters())
    train_a_step(model, optimizer)
    graph = ChannelGraph.trace(model, X)
    first, second = spaces(graph)
    with growth(optimizer, 1):
        widen(graph, target={first.name: 6}, noise=0.5, optimizer=optimizer)
    assert_numbers(model, optimizer, expected(model, [0, 0, 0, 0, 1, 1], [0] * 5))
    train_a_step(model, optimizer)
    with growth(optimizer, 2):
        widen(graph, target={first.name: 7, second.name: 7}, optimizer=optimizer)
    assert_numbers(model, optimizer, expected(model, [0, 0, 0, 0, 1, 1, 2], [0] * 5 + [2, 2]))
    graph.reindex_spaces({first: [6, 1, 5, 0], second: [2, 6, 3]}, optimizer)
    assert_numbers(model, optimizer, expected(model, [2, 0, 1, 0], [0, 2, 0]))
    train_a_step(model, optimizer)
    widen(graph, target={second.name: 4}, optimizer=optimizer)  # by somebody who asks for no rate of its own
    numbers = additions_of(optimizer).numbers[model[5].weight]
    assert numbers[0, :3, 0, 0].tolist() == [0, 2, 0] and numbers[0, 3, 0, 0] in (0, 2), "as what it is a copy of"


@pytest.mark.parametrize("factor", [0.0, 0.3, 4.0])
@pytest.mark.parametrize("name", OF_ALL_KINDS)
def test_new_entries_take_their_share_of_a_step_and_all_others_the_whole(name: str, factor: float) -> None:
    model = build(1, width=4)
    optimizer = OF_ALL_KINDS[name](model.parameters())
    step(model, optimizer)
    graph = trace(model)
    with growth(optimizer, 1):
        widen(graph, 1.5, noise=0.5, optimizer=optimizer)
    step(model, optimizer)
    additions = additions_of(optimizer)
    before = {p: p.detach().clone() for p in model.parameters()}
    state = copy.deepcopy(optimizer.state_dict())
    step(model, optimizer)
    plain = {p: p.detach().clone() for p in model.parameters()}
    with torch.no_grad():
        for parameter, value in before.items():
            parameter.copy_(value)
    optimizer.load_state_dict(state)
    additions.set_factors({1: factor, 2: 7.0})
    with additions.paced():
        step(model, optimizer)
    scaled = 0
    for parameter in model.parameters():
        new = additions.numbers.get(parameter, torch.zeros_like(parameter)) == 1
        scaled += int(new.sum())
        assert torch.equal(parameter[~new], plain[parameter][~new]), "to the bit"
        share = before[parameter] + factor * (plain[parameter] - before[parameter])
        torch.testing.assert_close(parameter[new], share[new], rtol=1e-12, atol=1e-12)
    assert 0.4 < scaled / sum(p.numel() for p in model.parameters()) < 0.7, "of 1.5 times the width, some 5 in 9"


@pytest.mark.parametrize(
    ("kind", "options"),
    [(SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}), (AdamW, {"lr": 0.01})],
)
def test_it_is_what_a_parameter_group_of_that_rate_does(kind: type, options: dict) -> None:
    """Entries of their own parameter, in a group with their rate, are the oracle, over steps of a rate that returns."""
    start = torch.randn(6, 3, dtype=torch.double)
    whole = nn.Parameter(start.clone())
    optimizer = kind([whole], **options)
    additions = additions_of(optimizer)
    additions.numbers[whole] = torch.tensor([0, 0, 1, 2, 2, 0], dtype=torch.int16)[:, None].expand(6, 3).clone()
    parts = {number: nn.Parameter(start[additions.numbers[whole][:, 0] == number].clone()) for number in (0, 1, 2)}
    apart = kind([{"params": [part]} for part in parts.values()], **options)
    for number in range(8):
        factors = {0: 1.0, 1: min(1.0, 0.2 + 0.2 * number), 2: 3.0}
        whole.grad = torch.randn_like(whole)
        for group, (growth_number, part) in zip(apart.param_groups, parts.items(), strict=True):
            group["lr"] = options["lr"] * factors[growth_number]
            part.grad = whole.grad[additions.numbers[whole][:, 0] == growth_number].clone()
        additions.set_factors({1: factors[1], 2: factors[2]})
        with additions.paced():
            optimizer.step()
        apart.step()
    for growth_number, part in parts.items():
        torch.testing.assert_close(whole[additions.numbers[whole][:, 0] == growth_number], part, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("operator", ["layer", "zero_gamma"])
def test_all_of_a_new_layer_is_new(operator: str) -> None:
    model = build(1, width=4)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    step(model, optimizer)
    graph, before = trace(model), set(model.parameters())
    inputs = [torch.randn(4, 3, 8, 8, dtype=torch.double)]
    with growth(optimizer, 3):
        if operator == "layer":
            graph.insert_layer(graph.layer_places[-1], inputs, optimizer=optimizer)
        else:
            graph.insert_block(graph.stage_ends[0].path, inputs, optimizer=optimizer)
    new = [p for p in model.parameters() if p not in before]
    assert new and set(additions_of(optimizer).numbers) == set(new)
    assert all((additions_of(optimizer).numbers[p] == 3).all() for p in new)
    additions_of(optimizer).set_factors({3: 0.0})
    values = [p.detach().clone() for p in new]
    with additions_of(optimizer).paced():
        step(model, optimizer)  # Adam makes its state of new parameters in their first step
    assert all(torch.equal(p, value) for p, value in zip(new, values, strict=True))
    additions_of(optimizer).set_factors({3: 1.0})
    with additions_of(optimizer).paced():
        step(model, optimizer)
    assert not any(torch.equal(p, value) for p, value in zip(new, values, strict=True) if p.dim() > 1 or p.any())
    assert not additions_of(optimizer).numbers, "like all else from now on"


def test_a_penalty_pulls_as_far_as_the_step_goes() -> None:
    weight = nn.Parameter(torch.randn(4, 3, dtype=torch.double))
    optimizer = SGD([weight], lr=0.1, momentum=0.5)
    assert step_length(optimizer, weight) == 0.2
    additions_of(optimizer).numbers[weight] = torch.tensor([0, 1, 0, 1], dtype=torch.int16)[:, None].expand(4, 3)
    assert step_length(optimizer, weight) == 0.2, "no factor is set"
    additions_of(optimizer).set_factors({1: 3.0})
    assert step_length(optimizer, weight) == 0.2, "and new elements take their share of it"


# -- in a run ---------------------------------------------------------------------------------------------------

OWN_RATE = ("grow.new_lr_factor=0.25", "grow.new_lr_epochs=2", "grow.rewarm_epochs=0")


@pytest.mark.parametrize("growth", GROWTHS)
def test_every_way_to_grow_takes_the_key(small_run, growth: str) -> None:
    for rate, factors in (((), {}), (OWN_RATE, {1: 0.25})):
        run = small_run("epochs=4", *GROWTHS[growth], *rate)
        for run.epoch in (1, 2):
            train_epoch(run)
            grow(run)
        assert run.change
        run.set_learning_rates(run.progress)
        additions = additions_of(run.optimizer)
        assert additions.factors == factors
        assert bool(additions.numbers) == bool(factors)
        assert len(run.growths) == len(factors)
        assert {id(p) for p in additions.numbers} <= {id(p) for p in run.model.parameters()}
    added = sum(int((numbers == 1).sum()) for numbers in additions.numbers.values())
    assert 0 < added < sum(p.numel() for p in run.model.parameters())


def test_the_rate_comes_back_and_then_nothing_is_left(small_run) -> None:
    run = small_run("epochs=8", *GROWTHS["wider"], *OWN_RATE, "prune.start_epoch=8")
    for run.epoch in (1, 2):
        train_epoch(run)
        grow(run)
    additions, since = additions_of(run.optimizer), run.progress
    assert since == pytest.approx(2)
    seen = []
    for ahead in (0.0, 1.0, 1.9, 2.0):
        run.set_learning_rates(since + ahead)
        seen.append(dict(additions.factors))
    assert seen == [{1: 0.25}, {1: pytest.approx(0.625)}, {1: pytest.approx(0.9625)}, {}]
    assert not additions.numbers


@pytest.mark.parametrize("factor", [0.0, 1e-6, 1.5])
def test_beside_what_learns_slowly_all_else_is_pruned_as_before(small_run, factor: float) -> None:
    """New columns lie in every row of a weight, so that they could hold all of it back."""
    rate = (f"grow.new_lr_factor={factor}", "grow.new_lr_epochs=2", "grow.rewarm_epochs=0")
    run = small_run("epochs=4", *GROWTHS["wider"], *rate)
    for run.epoch in (1, 2):
        train_epoch(run)
        grow(run)
    run.set_learning_rates(run.progress)
    prune, additions = run.methods["prune"], additions_of(run.optimizer)
    weights = [lasso.weight for lasso in prune.lassos]
    before = [weight.detach().clone() for weight in weights]
    prune.after_step(run)
    paced = [weight.detach().clone() for weight in weights]
    for weight, old in zip(weights, before, strict=True):
        weight.data.copy_(old)
    numbers, additions.factors = dict(additions.numbers), {}
    prune.after_step(run)
    mixed = 0
    for weight, old, new in zip(weights, before, paced, strict=True):
        added = numbers.get(weight, torch.zeros_like(weight)) == 1
        torch.testing.assert_close(new[~added], weight.detach()[~added], rtol=1e-5, atol=1e-8)
        share = old + factor * (weight.detach() - old)
        share[share * old < 0] = 0.0
        torch.testing.assert_close(new[added], share[added], rtol=1e-5, atol=1e-8)
        assert (weight.detach() - old).abs().max() > 1e-5, "the test is about a penalty that pulls"
        mixed += bool(added.any()) and not bool(added.all())
    assert mixed >= 3


def test_two_growths_have_each_their_own_rate(small_run) -> None:
    further = "{_target_:morphtrain.options.method,option:grow/deeper,at_epochs:[3],new_lr_factor:2,new_lr_epochs:9}"
    run = small_run("epochs=8", *GROWTHS["wider"], *OWN_RATE, f"methods=[{further}]", "prune.start_epoch=8")
    for run.epoch in (1, 2, 3):
        train_epoch(run)
        grow(run)
    run.set_learning_rates(run.progress)
    additions = additions_of(run.optimizer)
    assert additions.factors == {1: pytest.approx(0.625), 2: 2.0}
    blocks = {p for name, p in run.model.named_parameters() if (additions.numbers.get(p, torch.zeros(1)) == 2).all()}
    assert len(blocks) >= 6 and any((numbers == 1).any() for numbers in additions.numbers.values())


def test_a_checkpoint_has_it_all_and_an_older_one_goes_on_without(tmp_path: Path) -> None:
    config = morphtrain.compose(*SMALL, "epochs=6", *GROWTHS["wider"], *OWN_RATE, "tracking=none")
    run = build_run(config)
    start(run)
    for _ in range(3):
        begin_epoch(run)
        train_epoch(run)
        finish_epoch(run, lambda record, before: {**record, "contended": 0.0})
    checkpoint.save(run, tmp_path, None)
    again = Checkpoint(tmp_path / checkpoint.LAST).restore(config)
    assert again.growths == run.growths != []
    numbers, restored = (additions_of(one.optimizer).numbers for one in (run, again))
    parameters = zip(run.model.parameters(), again.model.parameters(), strict=True)
    pairs = [(numbers[p], restored[q]) for p, q in parameters if p in numbers]
    assert len(pairs) == len(numbers) == len(restored) > 0
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)

    stored = Checkpoint(tmp_path / checkpoint.LAST)
    name = next(iter(stored.content["additions"]))
    stored.content["additions"][name] = torch.zeros(1, dtype=torch.int16)
    with pytest.raises(UserError, match=f"its additions do not fit the parameter {name}"):
        stored.restore(config)
    del stored.content["additions"], stored.facts["growths"]
    assert stored.restore(config).growths == []


def test_resetting_all_weights_leaves_nothing_new(small_run) -> None:
    run = small_run("epochs=4", *GROWTHS["wider"], *OWN_RATE)
    for run.epoch in (1, 2):
        train_epoch(run)
        grow(run)
    assert additions_of(run.optimizer).numbers
    run.reset_weights()
    assert not additions_of(run.optimizer).numbers
