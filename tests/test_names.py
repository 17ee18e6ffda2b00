"""What a channel space is called, and what it is, follows from the network alone and not from how it came about."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Command, Kill
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import INPUT, SHAPES, build, random_keep
from test_resume import assert_same, contents
from topologies import TOPOLOGIES

from morphtrain.grow.regrowth import Regrowth
from morphtrain.model.mobilenet import MobileNet
from morphtrain.morph import ChannelGraph, MorphError, Space, describe, rebuild
from morphtrain.trainer.epoch import finish_epoch
from morphtrain.trainer.loop import train_epoch

CHANGES = ("prune", "drop", "remove", "widen", "block", "layer")
PLACES = {
    "network": st.sampled_from([*SHAPES, "mobilenet", *TOPOLOGIES]),
    "changes": st.lists(st.sampled_from(CHANGES), min_size=1, max_size=6),
    "seed": st.integers(0, 2**32),
}


def made(network: str) -> tuple[torch.nn.Module, Any]:
    if network in SHAPES:
        return build(2, **SHAPES[network]), INPUT[:1]
    if network == "mobilenet":
        return MobileNet(version=2, width_multiplier=0.1).double(), torch.zeros(1, 3, 8, 8, dtype=torch.double)
    make, inputs = TOPOLOGIES[network]
    return make().double(), inputs()


def change(graph: ChannelGraph, what: str, draw: random.Random, calibration: list[Any]) -> None:
    """One change at a random place; one that is refused changes nothing."""
    space = draw.choice(graph.spaces)
    blocks = [block for block in graph.blocks if graph.can_remove(block)]
    try:
        if what == "prune":
            graph.reindex_spaces({s: random_keep(s.size) for s in graph.spaces})
        elif what == "drop":
            graph.reindex(space, [])
        elif what == "widen":
            graph.reindex(space, [*range(space.size), 0])
        elif what == "remove" and blocks:
            graph.remove_block(draw.choice(blocks))
        elif what == "block" and graph.stage_ends:
            graph.insert_block(draw.choice(graph.stage_ends).path, calibration)
        elif what == "layer" and graph.layer_places:
            graph.insert_layer(draw.choice(graph.layer_places), calibration)
    except MorphError:
        pass


def structure(graph: ChannelGraph) -> list[Any]:
    """Everything about the spaces and blocks of a graph that code can see, in its order."""
    spaces = [(s.name, s.size, [(t.axis.path, t.role, t.start, t.segment.span) for t in s.slots]) for s in graph.spaces]
    blocks = [(b.path, [s.name for s in b.spaces], [s.name for s in b.outputs]) for b in graph.blocks]
    return [spaces, blocks, graph.layer_places, [*graph.block_places], [axis.path for axis in graph.axes]]


def mark(space: Space, number: float) -> None:
    """Write a number into all tensors that have the channels of a space."""
    for slot in space.slots:
        entries = torch.arange(slot.start, slot.start + slot.segment.length)
        for name, dim in slot.axis.tensors:
            getattr(slot.axis.module, name).data.index_fill_(dim, entries, number)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(**PLACES)
def test_after_any_changes_a_graph_is_a_fresh_one(network: str, changes: list[str], seed: int) -> None:
    check_names(network, changes, seed)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(**PLACES)
def test_after_many_changes_a_graph_is_a_fresh_one(network: str, changes: list[str], seed: int) -> None:
    check_names(network, changes, seed)


def check_names(network: str, changes: list[str], seed: int) -> None:
    torch.manual_seed(seed)
    model, inputs = made(network)
    fresh, draw, graph = copy.deepcopy(model), random.Random(seed), ChannelGraph.trace(model, inputs)
    calibration = [inputs.expand(2, -1, -1, -1)] if isinstance(inputs, torch.Tensor) else []
    for what in changes:
        if graph.spaces:
            change(graph, what, draw, calibration)
    spaces = graph.spaces
    renamed = graph.retrace()
    rebuilt = rebuild(fresh, json.loads(json.dumps(describe(model))))
    rebuilt.load_state_dict(model.state_dict())
    assert structure(graph) == structure(ChannelGraph.trace(model, inputs))
    assert structure(graph) == structure(ChannelGraph.trace(rebuilt, inputs))
    for number, space in enumerate(spaces, 1):
        if space.name in renamed:
            with torch.no_grad():
                mark(space, number)
            now = [getattr(t.axis.module, n) for t in graph.space(renamed[space.name]).slots for n, _ in t.axis.tensors]
            assert any(bool((tensor == number).any()) for tensor in now), "a new name is that of the same channels"


def test_a_width_to_compare_with_follows_its_space(small_run: Any) -> None:
    run = small_run("grow=selective", "grow.at_epochs=[5]", "model.shortcut=A", "prune.start_epoch=9")
    left, right = (space for space in run.graph.spaces if space.name.startswith("stages.1.0.branch.3:"))
    assert (left.name[-1], right.name[-1]) == ("0", "2")
    regrowth: Regrowth = run.methods["grow"].regrowth
    total = sum(regrowth.reference.values())
    run.graph.reindex(left, [])
    run.graph.reindex(right, range(1))
    run.shape_changed("the space on the left has gone")
    run.epoch -= 1
    train_one(run)
    assert regrowth.reference["stages.1.0.branch.3:1"] == 4, "what the space, called so now, had at the start"
    assert "stages.1.0.branch.3:2" not in regrowth.reference
    assert sum(regrowth.reference.values()) == total
    assert run.changes[-1]["widths"] == {
        s.name: s.size for s in ChannelGraph.trace(run.model, INPUT[:1].float()).spaces
    }


def train_one(run: Any) -> None:
    run.epoch += 1
    change = run.change
    train_epoch(run)
    run.change = change
    finish_epoch(run)


CUT = """
from morphtrain.method import Method


class Cut(Method):
    def after_epoch(self, run):
        if run.epoch == 2:
            run.graph.remove_block(next(b for b in run.graph.blocks if b.path.startswith("stages.2.0")), run.optimizer)
            run.graph.reindex(run.graph.space("stages.1.0.branch.3:0"), [], run.optimizer)
            run.shape_changed("cut")
"""


def test_a_resumed_run_calls_spaces_the_same(command: Command, kill: Kill, tmp_path: Path) -> None:
    """A space goes, and its neighbour is then called what a growth looks for; without the cut nothing is called so."""
    (tmp_path / "own_cut.py").write_text(CUT)
    growth = ("grow=wider", "grow.at_epochs=[4]", "grow.where=['stages.1.0.branch.3:1','stages.2.1.*']")
    cut = ("model.width=4", "prune.start_epoch=9", "methods=[{_target_: own_cut.Cut}]")
    here = [*SMALL, "tracking=none", "epochs=5", *cut, *growth]
    assert command(*here, "hydra.run.dir=once").returncode == 0
    there = [*here, "hydra.run.dir=twice", "resume=auto"]
    kill("rename:6", *there, env={"PYTHONPATH": str(tmp_path)})
    assert command(*there).returncode == 0
    once, twice = (contents(tmp_path / name / "last.pt") for name in ("once", "twice"))
    assert_same(once, twice)
    _, before, grown = (change["widths"] for change in once["facts"]["changes"])
    assert grown["stages.1.0.branch.3:1"] > before["stages.1.0.branch.3:1"]
