"""optimizer.fused: the same steps to rounding, through structural changes, loss scales and kills."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from test_memory_format import stop_after
from test_resume import assert_same
from torch import nn

import morphtrain
from morphtrain import schema
from morphtrain.cost import memory_model
from morphtrain.errors import UserError
from morphtrain.optimizer import fused
from morphtrain.state import Run
from morphtrain.trainer import checkpoint, stored_network
from morphtrain.trainer.build import build_run
from morphtrain.trainer.epoch import begin_epoch, finish_epoch, start
from morphtrain.trainer.loop import train_epoch

FUSED = "optimizer.fused=true"
KINDS = {"sgd": [], "adamw": ["optimizer=adamw", "optimizer.lr=0.01"]}


def config_of(*overrides: str) -> schema.Config:
    small = [o for o in SMALL if not (o.startswith("prune") and "prune=none" in overrides)]
    return morphtrain.compose(*small, "tracking=none", "device=cpu", *overrides)


def started(*overrides: str) -> Run:
    run = build_run(config_of(*overrides))
    start(run)
    return run


def epochs(run: Run, number: int) -> None:
    for _ in range(number):
        begin_epoch(run)
        train_epoch(run)
        finish_epoch(run)


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_takes_the_same_steps(kind: str, memory_format: str) -> None:
    """From equal states, before and after channels are removed and added; weights, momenta and moments."""
    grown = ["prune=none", "grow=wider", "grow.at_epochs=[1]", f"memory_format={memory_format}"]
    plain, run = started(*KINDS[kind], *grown), started(*KINDS[kind], *grown, FUSED)
    epochs(plain, 1)  # and it is wider
    epochs(run, 1)
    for one in (run, plain):
        for space in one.graph.spaces[:2]:
            one.graph.reindex(space, range(space.size - 1), optimizer=one.optimizer)
    run.model.load_state_dict(plain.model.state_dict())
    for p, q in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        assert run.optimizer.state[p].keys() == plain.optimizer.state[q].keys()
        for key, value in plain.optimizer.state[q].items():
            run.optimizer.state[p][key].copy_(value)
            assert run.optimizer.state[p][key].stride() == value.stride()
    x, y = next(iter(run.data.train_batches(16, torch.Generator())))
    for _ in range(3):
        for one in (run, plain):
            one.model.load_state_dict(plain.model.state_dict())  # a step each from the same weights
            one.optimizer.zero_grad()
            nn.functional.cross_entropy(one.model.train()(x), y).backward()
        before = [p.detach().clone() for p in plain.model.parameters()]
        run.optimizer.step()
        plain.optimizer.step()
        for p, q, old in zip(run.model.parameters(), plain.model.parameters(), before, strict=True):
            assert not torch.equal(q, old)
            torch.testing.assert_close(p - old, q - old, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_new_layers_take_the_same_first_step(kind: str) -> None:
    """Theirs is the first one, while all others have a momentum."""
    grown = ["prune=none", "grow=deeper", "grow.at_epochs=[1]", *KINDS[kind]]
    plain, run = started(*grown), started(*grown, FUSED)
    for one in (run, plain):
        epochs(one, 1)
    known = [p.detach().clone() for p in plain.model.parameters()]
    run.model.load_state_dict(plain.model.state_dict())
    run.optimizer.load_state_dict(copy.deepcopy(plain.optimizer.state_dict()))
    for group in run.optimizer.param_groups:
        group["fused"], group["foreach"] = True, None
    x, y = next(iter(run.data.train_batches(16, torch.Generator())))
    for one in (run, plain):
        one.optimizer.zero_grad()
        nn.functional.cross_entropy(one.model.train()(x), y).backward()
        assert any(p not in one.optimizer.state for p in one.model.parameters()), "some are new"
        one.optimizer.step()
    for p, q, old in zip(run.model.parameters(), plain.model.parameters(), known, strict=True):
        torch.testing.assert_close(p - old, q - old, rtol=1e-3, atol=1e-6)
        assert run.optimizer.state[p].keys() == plain.optimizer.state[q].keys()


@pytest.mark.parametrize("kind", KINDS)
def test_an_overflow_in_the_first_step_leaves_nothing_behind(kind: str) -> None:
    half = ["precision=o1", "precision.dtype=float16", "precision.init_scale=1e7", "prune=none", *KINDS[kind]]
    runs = [started(*half), started(*half, FUSED)]
    for run in runs:
        epochs(run, 1)
    assert runs[0].progress == runs[1].progress < 1, "steps were skipped"
    assert runs[1].train_loss == pytest.approx(runs[0].train_loss, rel=0.02)
    for p in runs[1].model.parameters():
        assert all(bool(value.isfinite().all()) for value in runs[1].optimizer.state[p].values())


@pytest.mark.parametrize("kind", KINDS)
def test_pruned_and_resumed_it_ends_at_the_same_bits(kind: str, tmp_path: Path) -> None:
    ends = []
    for name, stops in (("whole", [4]), ("parts", [2, 4])):
        (tmp_path / name).mkdir()
        for number, last in enumerate(stops):
            config = config_of(FUSED, "epochs=4", *KINDS[kind], f"resume={'auto' if number else 'never'}")
            stop_after(last, config, tmp_path / name)
        ends.append(torch.load(tmp_path / name / "last.pt", weights_only=True))
    assert_same(ends[1]["model"], ends[0]["model"])
    assert_same(ends[1]["optimizer"], ends[0]["optimizer"])
    assert all(group["fused"] for group in ends[0]["optimizer"]["param_groups"])


@pytest.mark.parametrize("kind", KINDS)
def test_its_memory_is_modelled(kind: str) -> None:
    plain, run = (started(*KINDS[kind], *more) for more in ([], [FUSED]))
    models = [memory_model(one.model, one.data.input_shape, optimizer=one.optimizer) for one in (plain, run)]
    assert models[1].peak(64) == pytest.approx(models[0].peak(64), rel=0.02)
    assert all(group["fused"] for group in run.optimizer.param_groups)


def test_without_the_key_torch_chooses_as_before() -> None:
    assert [group["fused"] for group in started().optimizer.param_groups] == [None, None]


def test_where_there_is_no_kernel_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_get_fused_kernels_supported_devices", lambda: ["cuda"])
    with pytest.raises(UserError, match=r"^optimizer\.fused=true: torch has no such kernel for float32 on cpu; false"):
        started(FUSED)


def test_checkpoints_from_before_these_keys_go_on(tmp_path: Path) -> None:
    """`optimizer.fused`, `compile` and what is chosen for `auto`."""
    stop_after(1, config_of("epochs=2"), tmp_path)
    path = tmp_path / "last.pt"
    content = torch.load(path, weights_only=True)
    facts = json.loads(content["facts"])
    for node, key in ((facts["config"]["optimizer"], "fused"), (facts["config"], "compile")):
        del node[key]
    for key in ("chosen", "compilation"):
        del facts[key]
    torch.save({**content, "facts": json.dumps(facts), "format": stored_network.WITHOUT_DIGEST}, path)
    run = checkpoint.Checkpoint(path).restore(config_of("epochs=2"))
    assert run.epoch == 1
    with pytest.raises(UserError, match=r"optimizer\.fused=true: .* was written with optimizer\.fused=false"):
        checkpoint.Checkpoint(path).restore(config_of("epochs=2", FUSED))
