"""The networks: published parameter counts, shapes, widths, the functions torchvision's compute, wrong options."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_config import CONF, REQUIRED, composed
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models
from torchvision.models.resnet import Bottleneck
from torchvision.models.resnet import ResNet as TorchvisionResNet
from torchvision.models.vgg import cfgs, make_layers

from morphtrain import options, schema
from morphtrain.cost import count_macs, count_params
from morphtrain.errors import UserError
from morphtrain.model import VGG, AlexNet, MobileNet, ResNet
from morphtrain.model import torchvision as option_torchvision
from morphtrain.model.mobilenet import InvertedResidual, rounded

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
        ({"bottleneck": True, "layers": 2}, "layers=2: must be 3 or more"),
        ({"shortcut": "C"}, "shortcut='C'"),
        ({"stem": "mnist"}, "stem='mnist'"),
        ({"make": VGG, "depth": 19}, "depth=19"),
        ({"make": VGG, "head": "large"}, "head='large'"),
        ({"make": AlexNet, "stem": "mnist"}, "stem='mnist'"),
        ({"make": MobileNet, "version": 3}, "version=3"),
        ({"make": MobileNet, "stem": "mnist"}, "stem='mnist'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    make = options.pop("make", ResNet)
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.fixture
def without_data() -> Iterator[None]:
    """Tensors have shapes only: full-size networks cost nothing."""
    with torch.device("meta"):
        yield


# -- every option file -------------------------------------------------------------------------------------------

SMALL_IMAGES, LARGE_IMAGES = (8, 16, 28, 32, 64), (64, 96, 224)
CHOICES = {
    **{f"model={path.stem}": SMALL_IMAGES for path in sorted((CONF / "model").glob("*.yaml")) if path.stem != "custom"},
    "model=torchvision": (32, 224),
    "model=resnet50": LARGE_IMAGES,
    "model=resnet50 model.stem=cifar": SMALL_IMAGES,
    "model=vgg13 model.head=imagenet": (*SMALL_IMAGES, 224),
    "model=alexnet model.stem=imagenet": LARGE_IMAGES,
    "model=mobilenet_v1 model.stem=imagenet": (32, *LARGE_IMAGES),
    "model=mobilenet_v2 model.stem=imagenet": (32, *LARGE_IMAGES),
}


@pytest.mark.usefixtures("without_data")
@pytest.mark.parametrize("choice", CHOICES)
def test_every_preset_takes_the_images_it_is_meant_for(choice: str) -> None:
    config = schema.parse(composed(*choice.split(), *REQUIRED.get(choice, []))).model
    for in_channels in (1, 3):
        model = options.build("model", config, num_classes=7, in_channels=in_channels)
        for size in CHOICES[choice][:: 1 if in_channels == 3 else 2]:
            assert model(torch.empty(2, in_channels, size, size)).shape == (2, 7), (in_channels, size)


# -- against torchvision -----------------------------------------------------------------------------------------

PEERS: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module], dict[str, Any]]] = {
    "resnet50": (models.resnet50, ResNet, {"stages": 4, "blocks": [3, 4, 6, 3], "layers": 3, "bottleneck": True}),
    "vgg11": (models.vgg11, VGG, {"depth": 11, "batch_norm": False, "head": "imagenet"}),
    "vgg11_bn": (models.vgg11_bn, VGG, {"depth": 11, "head": "imagenet"}),
    "vgg13_bn": (models.vgg13_bn, VGG, {"depth": 13, "head": "imagenet"}),
    "vgg16_bn": (models.vgg16_bn, VGG, {"depth": 16, "head": "imagenet"}),
    "alexnet": (models.alexnet, AlexNet, {"stem": "imagenet"}),
    "mobilenet_v2": (models.mobilenet_v2, MobileNet, {"stem": "imagenet"}),
    "mobilenet_v2 1.4": (lambda: models.mobilenet_v2(width_mult=1.4), MobileNet, {"width_multiplier": 1.4}),
    "mobilenet_v2 0.35": (lambda: models.mobilenet_v2(width_mult=0.35), MobileNet, {"width_multiplier": 0.35}),
}
PEERS["resnet50"][2].update(width=64, shortcut="B", stem="imagenet")


@pytest.mark.parametrize("name", PEERS)
def test_parameters_and_macs_are_torchvisions(name: str) -> None:
    theirs, ours, options = PEERS[name]
    with torch.device("meta"):
        mine, peer = (
            ours(num_classes=1000, **{"stem": "imagenet", **options} if ours is MobileNet else options),
            theirs(),
        )
    assert count_params(mine) == count_params(peer)
    assert count_macs(mine, (3, 224, 224)) == count_macs(peer, (3, 224, 224))


def test_parameters_of_mobilenet_v1_are_the_papers() -> None:
    with torch.device("meta"):
        counts = [
            count_params(MobileNet(version=1, width_multiplier=m, num_classes=1000)) for m in (1, 0.75, 0.5, 0.25)
        ]
    assert [round(count / 1e6, 1) for count in counts] == [4.2, 2.6, 1.3, 0.5]  # table 6
    assert counts[0] == 4231976


def test_parameters_of_vgg8() -> None:
    weights = 9 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512 * 512)
    channels = 64 + 128 + 256 + 512 + 512
    assert count_params(VGG(depth=8, num_classes=10)) == weights + 3 * channels + 512 * 10 + 10


FUNCTIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "resnet": (
        lambda: ResNet(stages=4, blocks=1, layers=3, bottleneck=True, width=64, shortcut="B", stem="imagenet"),
        lambda: TorchvisionResNet(Bottleneck, [1, 1, 1, 1], num_classes=10),
    ),
    "vgg11": (lambda: VGG(depth=11, batch_norm=False).features, lambda: make_layers(cfgs["A"])),
    "vgg16_bn": (lambda: VGG(depth=16).features, lambda: make_layers(cfgs["D"], batch_norm=True)),
    "mobilenet_v2": (
        lambda: MobileNet(width_multiplier=0.35, stem="imagenet"),
        lambda: models.mobilenet_v2(width_mult=0.35, num_classes=10),
    ),
    "alexnet": (lambda: AlexNet(stem="imagenet").features, lambda: models.alexnet().features),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_with_the_same_weights_it_computes_what_torchvisions_does(name: str) -> None:
    ours, theirs = (make() for make in FUNCTIONS[name])
    pairs = zip(theirs.state_dict().items(), ours.state_dict().values(), strict=True)
    theirs.load_state_dict({key: tensor for (key, _), tensor in pairs})
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


# -- keys --------------------------------------------------------------------------------------------------------


def widths(model: nn.Module) -> list[int]:
    return [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]


def count(model: nn.Module, kind: type) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.usefixtures("without_data")
def test_width_scales_every_layer() -> None:
    assert widths(VGG(depth=8, width=6)) == [6, 12, 24, 48, 48]
    assert widths(VGG(depth=16, width=1)) == [1] * 2 + [2] * 2 + [4] * 3 + [8] * 6
    for version, first, last in ((1, 8, 256), (2, 8, 1280)):
        narrow = widths(MobileNet(version=version, width_multiplier=0.25))
        wide = widths(MobileNet(version=version, width_multiplier=2.0))
        assert (narrow[0], narrow[-1]) == (first, last)
        assert (wide[0], wide[-1]) == (64, 2560 if version == 2 else 2048)
        assert all(width % 8 == 0 for width in narrow + wide)


def test_rounding_to_multiples_of_8_never_takes_more_than_a_tenth() -> None:
    assert [rounded(w) for w in (3.2, 8, 11.9, 12, 17.7, 24 * 0.35, 24 * 0.75)] == [8, 8, 16, 16, 16, 8, 24]
    assert all(rounded(w) >= 0.9 * w and abs(rounded(w) - w) < 8 for w in range(8, 2000))


@pytest.mark.usefixtures("without_data")
@pytest.mark.parametrize("make", [lambda norm: VGG(depth=13, batch_norm=norm), lambda norm: AlexNet(batch_norm=norm)])
def test_batch_norm_follows_every_convolution_or_none(make: Callable[[bool], nn.Module]) -> None:
    model = make(False)
    assert count(model, nn.BatchNorm2d) == 0
    features = list(make(True).features)
    norms = [after for before, after in pairwise(features) if isinstance(before, nn.Conv2d)]
    assert all(isinstance(norm, nn.BatchNorm2d) for norm in norms)
    assert len(norms) == count(model, nn.Conv2d) > 0


@pytest.mark.usefixtures("without_data")
def test_dropout_is_the_heads_own_or_what_the_key_says() -> None:
    def shares(model: nn.Module) -> list[float]:
        return [module.p for module in model.modules() if isinstance(module, nn.Dropout)]

    for large, small in (
        ({"make": VGG, "depth": 8, "head": "imagenet"}, {"make": VGG, "depth": 8, "head": "cifar"}),
        ({"make": AlexNet, "stem": "imagenet"}, {"make": AlexNet, "stem": "cifar"}),
    ):
        make, _ = large.pop("make"), small.pop("make")
        assert shares(make(**large)) == [0.5, 0.5]
        assert shares(make(**small)) == [0.0]
        assert shares(make(**large, dropout=0.1)) == [0.1, 0.1]
        assert shares(make(**small, dropout=0.1)) == [0.1]


@pytest.mark.usefixtures("without_data")
@pytest.mark.parametrize("version", [1, 2])
def test_mobilenets_stem_decides_how_often_the_resolution_is_halved(version: int) -> None:
    for stem, size in (("cifar", 28), ("imagenet", 7)):
        features = MobileNet(version=version, stem=stem).features
        assert features(torch.empty(2, 3, 224, 224)).shape[2:] == (size, size)
    assert features[0](torch.empty(2, 3, 224, 224)).shape[2:] == (112, 112)


def test_inverted_residual_blocks_are_a_branch_that_ends_in_a_norm_plus_their_input() -> None:
    blocks = [m for m in MobileNet().modules() if isinstance(m, InvertedResidual)]
    residual = [block for block in blocks if block.residual]
    assert (len(blocks), len(residual)) == (17, 10)  # table 2 of the paper
    for block in residual:
        last = block.branch[-1]
        assert isinstance(last, nn.BatchNorm2d)
        nn.init.zeros_(last.weight)
        x = torch.randn(2, block.branch[0].in_channels, 4, 4)
        assert torch.equal(block(x), x)


def test_convolutions_start_with_the_variance_of_their_own_fan_out() -> None:
    convolutions = [m for m in MobileNet().modules() if isinstance(m, nn.Conv2d)]
    assert {m.groups > 1 for m in convolutions} == {True, False}
    for m in convolutions:
        fan_out = math.prod(m.kernel_size) * m.out_channels / m.groups
        assert m.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.2)


# -- torchvision's own -------------------------------------------------------------------------------------------


def torchvision_network(name: str, in_channels: int = 3, **options: Any) -> nn.Module:
    return option_torchvision.build(
        schema.model.Torchvision(name=name, source="torchvision", options=options), 7, in_channels
    )


@pytest.mark.usefixtures("without_data")
def test_only_the_first_convolution_knows_of_the_images_channels() -> None:
    for name in ("densenet121", "squeezenet1_1", "googlenet"):
        three, one = torchvision_network(name), torchvision_network(name, in_channels=1)
        shapes, adapted = ({k: v.shape for k, v in m.state_dict().items()} for m in (three, one))
        (changed,) = (key for key in shapes if shapes[key] != adapted[key])
        assert (shapes[changed][1], adapted[changed][1]) == (3, 1)
        x = torch.empty(2, 1, 64, 64)
        assert one(x).shape == (2, 7)
        convolutions = (next(m for m in net.modules() if isinstance(m, nn.Conv2d)) for net in (three, one))
        a, b = ({**m.__dict__, "in_channels": 0, "_parameters": 0} for m in convolutions)
        assert {k: v for k, v in a.items() if k[0] != "_"} == {k: v for k, v in b.items() if k[0] != "_"}


@pytest.mark.usefixtures("without_data")
def test_options_reach_torchvisions_constructor() -> None:
    half, full = torchvision_network("mobilenet_v2", width_mult=0.5), torchvision_network("mobilenet_v2")
    assert widths(half)[0] * 2 == widths(full)[0]
    kept = {"width_mult": 0.5}
    torchvision_network("mobilenet_v2", **kept)
    assert kept == {"width_mult": 0.5}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet19", {}, "model.name=resnet19: .* did you mean resnet1"),
        ("fasterrcnn_resnet50_fpn", {}, "no such network for classification"),
        ("quantized_resnet18", {}, "no such network"),
        ("fcn_resnet50", {}, "no such network"),
        ("r3d_18", {}, "no such network"),
        ("mobilenet_v3_small", {"widht_mult": 0.5}, "model.options.widht_mult=0.5: .* did you mean width_mult"),
        ("convnext_tiny", {"stochastic_depth": 0.5}, "did you mean stochastic_depth_prob"),
        ("densenet121", {"model": 3}, "does not accept them: .*'model'"),
        ("resnet18", {"replace_stride_with_dilation": [True]}, "does not accept them: .*3-element"),
    ],
)
def test_torchvision_refusals_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        torchvision_network(name, **options)


def test_no_network_of_torchvision_that_is_not_for_classification_is_offered() -> None:
    others = [
        m
        for kind in (models.detection, models.segmentation, models.video, models.quantization)
        for m in models.list_models(module=kind)
    ]
    assert others
    assert not set(others) & set(option_torchvision.names())
