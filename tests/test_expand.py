"""Growing to a target: met within a channel, and only where the channels were kept."""

from __future__ import annotations

import pytest
import torch
from networks import INPUT, PRESETS, SHAPES, build, random_keep, trace
from test_costs import own_term
from test_growth import OWN, assert_kept, evaluated

from morphtrain.cost import WidthCost, count_params
from morphtrain.grow.expand import expand_to
from morphtrain.grow.kept import grow_where_kept, kept_spaces
from morphtrain.grow.size import params_at
from morphtrain.morph import ChannelGraph


@pytest.mark.parametrize("share", [1.0, 1.7, 4.0])
@pytest.mark.parametrize("kind", ["flops", "model_size", "latency", "params"])
@pytest.mark.parametrize("name", ["resnet20", "vgg11", "mobilenet_v2"])
def test_the_target_is_met_within_one_channel(name: str, kind: str, share: float) -> None:
    torch.manual_seed(0)
    model = OWN[name]()
    graph = ChannelGraph.trace(model, torch.randn(1, 3, 32, 32))
    term_of = own_term if kind == "latency" else None
    cost = params_at(graph) if kind == "params" else WidthCost(graph, kind, term_of=term_of)
    target = share * cost({})
    graph.reindex_spaces({space: random_keep(space.size, least=(space.size + 1) // 2) for space in graph.spaces})
    before = evaluated(model.double(), x := torch.randn(2, 3, 32, 32, dtype=torch.double))
    expand_to(graph, cost, target, noise=0.3)
    assert_kept(model, x, before)
    assert cost({}) <= target
    assert any(cost({space: space.size + 1}) > target for space in graph.spaces), "one channel more fits everywhere"
    assert cost({}) > 0.97 * target
    if kind == "params":
        assert cost({}) == count_params(model)


@pytest.mark.parametrize("blocks", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_params_at_is_count_params(shape: str, blocks: int) -> None:
    graph = trace(build(blocks, **SHAPES[shape]))
    widths = {space: int(torch.randint(1, 9, ())) for space in graph.spaces}
    wanted = params_at(graph)(widths)
    for space, width in widths.items():
        graph.reindex(space, torch.randint(space.size, (width,)))
    assert wanted == count_params(graph.model)


@pytest.mark.parametrize("operator", ["wider", "deeper", "auto"])
def test_only_what_kept_its_channels_grows(operator: str) -> None:
    torch.manual_seed(0)
    model = build(2, width=8, shortcut="B")  # with padded shortcuts stages share channels
    graph = trace(model)
    reference = {space.name: space.size for space in graph.spaces}

    def cost(graph: ChannelGraph) -> WidthCost:
        return WidthCost(graph, "flops")

    target = 1.5 * cost(graph)()
    shrunk = [space for space in graph.spaces if space.name.startswith(("stages.1", "stages.2.0.branch"))]
    shrunk = [space for space in shrunk if space.name != "stages.2.0.branch.3"]  # where the last stage adds up
    graph.reindex_spaces({space: range(space.size // 2) for space in shrunk})
    left = {space.name: space.size for space in shrunk}
    assert {s.name for s in kept_spaces(graph, reference, 0.9)} == set(reference) - set(left)
    before = evaluated(model, INPUT)
    growth = grow_where_kept(graph, reference, cost, target, operator=operator, calibration=[INPUT], noise=0.2)
    assert_kept(model, INPUT, before)
    now = {space.name: space.size for space in graph.spaces}
    assert {name: now[name] for name in left} == left
    assert cost(graph)() <= target
    assert bool(growth.widths) == (operator != "deeper")
    assert [path.split(".")[1] for path in growth.blocks] == ([] if operator == "wider" else ["0"])
    assert not set(growth.widths) & set(left)
