"""ResNets: the thesis's parameter counts, shapes, and what a wrong option says."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from morphtrain.cost import count_macs, count_params
from morphtrain.model import ResNet

# (stages, blocks a stage) -> parameters, from the thesis' table of batch sizes: the count for one block a stage, and
# what each further block adds. All 43 rows follow (one digit of the print is wrong in row (4, 5)).
THESIS_PARAMS = {1: (7642, 7008, 11), 2: (31034, 34848, 11), 3: (123898, 145824, 11), 4: (493946, 588960, 10)}


@pytest.mark.parametrize(
    ("stages", "blocks"), [(s, n) for s, (_, _, most) in THESIS_PARAMS.items() for n in range(1, most + 1)]
)
def test_parameters_are_those_of_the_thesis(stages: int, blocks: int) -> None:
    first, each, _ = THESIS_PARAMS[stages]
    with torch.device("meta"):
        model = ResNet(stages=stages, blocks=blocks, layers=3)
    assert count_params(model) == first + each * (blocks - 1)


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("downsample", [False, True])
def test_macs_agree_with_torchs_counter(shortcut: str, bottleneck: bool, downsample: bool) -> None:
    model = ResNet(blocks=[1, 2, 1], layers=3, bottleneck=bottleneck, shortcut=shortcut, downsample=downsample)
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.randn(1, 3, 20, 20))
    assert 2 * count_macs(model, (3, 20, 20)) == counter.get_total_flops()


def test_counting_leaves_no_mark() -> None:
    model = ResNet(blocks=1).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count_macs(model, (3, 16, 16))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_resolution_and_width_per_stage() -> None:
    x = torch.randn(2, 3, 16, 16)
    model = ResNet(stages=3, blocks=1, width=8)
    sizes = [x.shape[1:] for x in stage_outputs(model, x)]
    assert sizes == [(8, 16, 16), (16, 8, 8), (32, 4, 4)]
    flat = ResNet(stages=2, blocks=1, width=8, bottleneck=True, layers=3, downsample=False)
    assert [x.shape[1:] for x in stage_outputs(flat, x)] == [(32, 16, 16), (64, 16, 16)]


def stage_outputs(model: ResNet, x: torch.Tensor) -> list[torch.Tensor]:
    x = model.stem(x)
    return [x := stage(x) for stage in model.stages]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": [1, 2]}, "blocks="),
        ({"bottleneck": True, "layers": 2}, "at least 3 layers"),
        ({"shortcut": "C"}, "shortcut='C'"),
    ],
)
def test_wrong_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResNet(**options)
