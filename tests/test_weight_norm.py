"""Weight norm: what it starts from, and that channels are the same to everything else as without it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL
from networks import INPUT, build, check_surgery, outputs, trace
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import densenet121, shufflenet_v2_x0_5

import morphtrain
from morphtrain import options
from morphtrain.cost import WidthCost, count_macs, count_params, estimate_memory
from morphtrain.errors import UserError
from morphtrain.export.write import export
from morphtrain.grow.net2deeper import insert_block_like
from morphtrain.grow.net2net import widen
from morphtrain.grow.size import params_at
from morphtrain.initialise import fresh_weights
from morphtrain.model import ResNet
from morphtrain.model.alexnet import AlexNet
from morphtrain.model.mobilenet import MobileNet
from morphtrain.model.vgg import VGG
from morphtrain.morph import MIXING, ChannelGraph, describe
from morphtrain.morph.effective import effective, fold
from morphtrain.norm.mean_only import MeanOnlyBatchNorm
from morphtrain.norm.weight import initialise, to_weight_norm
from morphtrain.prune.channel_norms import ChannelNorms
from morphtrain.prune.fading import Fading
from morphtrain.prune.importance import Taylor, magnitude
from morphtrain.prune.lasso import GroupLasso, add_gradient, amount_of_step, group_lassos, penalty, shrink
from morphtrain.prune.reconfigure import reconfigure
from morphtrain.prune.weights import Normed, value_of
from morphtrain.settling import settle, trained_norms
from morphtrain.state import Run
from morphtrain.trainer import begin_epoch, build_run, checkpoint, finish_epoch, networks, start, train_epoch


class Own(nn.Module):
    """A user's network: a layer that is called twice, a transposed and a grouped convolution, a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.twice = nn.Conv2d(6, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 8, 1, groups=2)
        self.up = nn.ConvTranspose2d(8, 5, 2, bias=False)
        self.head = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU())
        self.tied, self.untied = nn.Linear(7, 7), nn.Linear(7, 7)
        self.untied.weight = self.tied.weight
        self.last = nn.Linear(7, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = F.relu(self.twice(F.relu(self.twice(x))))
        x = self.up(F.relu(self.grouped(x))).mean((2, 3))
        return self.last(self.untied(F.relu(self.tied(self.head(x)))))


NETWORKS = {
    "resnet A": lambda: ResNet(blocks=2, width=8),
    "resnet B": lambda: ResNet(blocks=1, width=8, shortcut="B", bottleneck=True, layers=3),
    "vgg": lambda: VGG(depth=8, width=8),
    "alexnet": AlexNet,
    "mobilenet_v1": lambda: MobileNet(version=1, width_multiplier=0.25),
    "mobilenet_v2": lambda: MobileNet(version=2, width_multiplier=0.25),
    "shufflenet": lambda: shufflenet_v2_x0_5(num_classes=10),
    "densenet": lambda: densenet121(num_classes=10),
    "own": Own,
}
SLOW = ("densenet",)


def normed(model: nn.Module, mean_only: bool = False) -> nn.Module:
    """The network with weight norm, and lengths and directions unlike those that it starts with."""
    to_weight_norm(model, mean_only)
    with torch.no_grad():
        for layer in layers_of(model):
            g, v = parts(layer)
            g.mul_(torch.empty_like(g).uniform_(0.5, 2) * torch.where(torch.rand_like(g) < 0.3, -1.0, 1.0))
            v.mul_(torch.empty_like(g).uniform_(0.3, 3))
            if layer.bias is not None:
                layer.bias.normal_(0, 0.1)
    return model


def layers_of(model: nn.Module) -> list[Any]:
    """The layers with weight norm."""
    return [m for m in model.modules() if isinstance(m, MIXING) and "weight" in getattr(m, "parametrizations", ())]


def parts(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """g and v."""
    computed = layer.parametrizations["weight"]
    return computed.original0, computed.original1


def folded(model: nn.Module) -> nn.Module:
    """The same network with plain weights."""
    twin = copy.deepcopy(model)
    fold(twin)
    return twin


def pass_of(model: nn.Module, images: torch.Tensor, kinds: tuple[type, ...]) -> dict[str, torch.Tensor]:
    """What the first call of each layer of these kinds gives, (channels, values), in the mode that the model is in."""
    found: dict[str, torch.Tensor] = {}

    def look(path: str) -> Any:
        def hook(module: Any, args: Any, out: torch.Tensor) -> None:
            dim = out.dim() + 1 - module.weight.dim() if isinstance(module, MIXING) else 1
            found.setdefault(path, out.transpose(0, dim).flatten(1).double())

        return hook

    handles = [m.register_forward_hook(look(path)) for path, m in model.named_modules() if isinstance(m, kinds)]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found


def assert_standard(values: torch.Tensor, mean: bool = True) -> None:
    assert not mean or values.mean(1).abs().max() < 1e-3
    assert (values.std(1, correction=0) - 1).abs().max() < 1e-3


# -- the layers, and what they start from ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "axis"),
    [
        (nn.Conv2d(3, 4, 3), 0),
        (nn.Conv2d(4, 4, 3, groups=4), 0),
        (nn.Conv1d(3, 5, 2), 0),
        (nn.Linear(6, 3), 0),
        (nn.ConvTranspose2d(3, 4, 2), 1),
    ],
)
def test_the_weight_is_g_times_the_direction_of_v(layer: nn.Module, axis: int) -> None:
    """Against numpy, which knows nothing of parametrisations; g is one for each output channel."""
    model = normed(nn.Sequential(layer))
    g, v = (tensor.detach().double().numpy() for tensor in parts(model[0]))
    others = tuple(d for d in range(v.ndim) if d != axis)
    wanted = g * v / np.sqrt((v**2).sum(axis=others, keepdims=True))
    assert g.size == (v.shape[axis]) == (getattr(layer, "out_channels", None) or layer.out_features)
    np.testing.assert_allclose(model[0].weight.detach().numpy(), wanted, rtol=1e-5)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in NETWORKS])
def test_it_starts_with_mean_0_and_deviation_1(name: str) -> None:
    model, images = NETWORKS[name]().train(), 2 + 3 * torch.randn(32, 3, 32, 32)
    assert to_weight_norm(model) == len(layers_of(model)) > 3
    assert not any(isinstance(module, _BatchNorm) for module in model.modules())
    assert all(layer.bias is not None for layer in layers_of(model))
    assert initialise(model, images) == []
    assert model.training
    paths = {path for path, module in model.named_modules() if module in set(layers_of(model))}
    for path, values in pass_of(model.eval(), images, MIXING).items():
        if path in paths:
            assert_standard(values)


@pytest.mark.parametrize("name", ["resnet A", "vgg", "mobilenet_v2", "own"])
def test_mean_only_norms_take_the_place_of_batch_norms(name: str) -> None:
    model, images = NETWORKS[name](), torch.randn(32, 3, 32, 32)
    before = {path: module.num_features for path, module in model.named_modules() if isinstance(module, _BatchNorm)}
    biases = {path for path, module in model.named_modules() if getattr(module, "bias", None) is not None}
    to_weight_norm(model, mean_only=True)
    found = {path: module.num_features for path, module in model.named_modules() if isinstance(module, _BatchNorm)}
    assert found == before
    assert {type(model.get_submodule(path)) for path in found} == {MeanOnlyBatchNorm}
    assert biases == {path for path, module in model.named_modules() if getattr(module, "bias", None) is not None}
    initialise(model, images)
    for values in pass_of(model.train(), images, (MeanOnlyBatchNorm,)).values():
        assert_standard(values)


def test_a_channel_that_does_not_vary_keeps_its_length() -> None:
    """Nothing is divided by a deviation of zero, nor by one that is rounding."""
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    to_weight_norm(model)
    before = [part.clone() for part in parts(model[0])]
    initialise(model, torch.full((8, 1, 2, 2), 1e3))
    assert all(torch.equal(*pair) for pair in zip(before, parts(model[0]), strict=True))
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    (constant,) = pass_of(model, torch.full((8, 1, 2, 2), 1e3), (nn.Conv2d,)).values()
    assert constant.abs().max() < 1e-2, "the bias still takes the mean off"


def test_weights_that_start_from_zero_stay_zero_and_learn() -> None:
    """As those of a classifier, or of the last layer of a branch, often do."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    nn.init.zeros_(model[3].weight)
    with torch.no_grad():
        model[0].weight[1] = 0
    images, plain = torch.randn(8, 3, 3, 3), copy.deepcopy(model)
    to_weight_norm(model)
    torch.testing.assert_close(model(images), plain(images))
    initialise(model, images)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(images), torch.arange(8) % 2).backward()
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert bool((effective(model[3]) != 0).all())


def test_what_the_pass_does_not_reach_is_named_and_left() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.beside = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x) + self.beside(x) if self.training else self.used(x)

    model = Beside()
    to_weight_norm(model)
    before = copy.deepcopy(model.beside.state_dict())
    assert initialise(model, torch.randn(64, 4)) == ["beside"]
    assert all(torch.equal(before[name], value) for name, value in model.beside.state_dict().items())


def test_what_cannot_have_it_stays_plain() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)

    model = Own()
    assert to_weight_norm(model) == 6
    assert model.tied.weight is model.untied.weight
    assert type(model.tied.weight) is nn.Parameter
    others = nn.Sequential(
        Standardised(3, 4, 1),
        nn.ConvTranspose2d(4, 4, 2, groups=2),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)),
    )
    assert to_weight_norm(others) == 0
    with pytest.raises(UserError, match="norm=weight: the model has no convolution"):
        options.build("norm", morphtrain.compose("norm=weight").norm, model=others)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.LayerNorm([4, 8, 8]), nn.InstanceNorm2d(4)])
def test_it_is_not_stacked_on_other_norms(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        UserError, match=f"norm=weight: 1 is a {type(norm).__name__}, which it does not replace"
    ) as error:
        to_weight_norm(model)
    assert "\n" not in str(error.value)
    assert before.keys() == model.state_dict().keys()


# -- mean-only batch norm -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 3, 4, 5), (6, 3), (6, 3, 7)])
@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_a_mean_only_norm_equals_numpy(shape: tuple[int, ...], momentum: float | None) -> None:
    norm = MeanOnlyBatchNorm(3, momentum=momentum).double()
    nn.init.normal_(norm.bias)
    axes, channels = (0, *range(2, len(shape))), (1, 3, *[1] * (len(shape) - 2))
    running = np.zeros(3)
    bias = norm.bias.detach().numpy().reshape(channels)
    for number in range(1, 4):
        x = (number + torch.randn(shape)).double().requires_grad_()
        values, drawn = x.detach().numpy(), torch.randn(shape).double()
        mean = values.mean(axes)
        share = 1 / number if momentum is None else momentum
        running = (1 - share) * running + share * mean
        y = norm(x)
        np.testing.assert_allclose(y.detach().numpy(), values - mean.reshape(channels) + bias, atol=1e-12)
        np.testing.assert_allclose(norm.running_mean.numpy(), running, atol=1e-12)
        (grad, of_bias) = torch.autograd.grad((y * drawn).sum(), [x, norm.bias])
        weights = drawn.numpy()  # dL/dx = w - mean(w), as each value is in the mean of all
        np.testing.assert_allclose(grad.numpy(), weights - weights.mean(axes, keepdims=True), atol=1e-12)
        np.testing.assert_allclose(of_bias.numpy(), weights.sum(axes), atol=1e-12)
    x = torch.randn(shape).double()
    wanted = x.numpy() - running.reshape(channels) + bias
    np.testing.assert_allclose(norm.eval()(x).detach().numpy(), wanted, atol=1e-12)
    assert set(norm.state_dict()) == {"bias", "running_mean", "num_batches_tracked"}


def test_a_mean_only_norm_in_16_bits_rounds_once() -> None:
    norm, x = MeanOnlyBatchNorm(4), (100 + torch.randn(64, 4, 8, 8)).bfloat16()
    y = norm(x)
    assert y.dtype is torch.bfloat16
    exact = x.double() - x.double().mean((0, 2, 3), keepdim=True)
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-4)  # a mean in 16 bits would be off by 0.25


def test_a_mean_only_norm_takes_no_single_value() -> None:
    norm = MeanOnlyBatchNorm(3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(torch.randn(1, 3, 1, 1))
    norm.eval()(torch.randn(1, 3, 1, 1))


def test_its_running_mean_is_settled_and_its_channels_are_followed() -> None:
    model = normed(build(2, width=8), mean_only=True).train()
    batches = [torch.randn(12, 3, 8, 8).double() for _ in range(3)]
    settle(model, trained_norms(model), batches)
    first = model.stem[1].running_mean
    outs = [model.stem[0](images).mean((0, 2, 3)) for images in batches]
    torch.testing.assert_close(first, torch.stack(outs).mean(0).detach())
    graph = check_surgery(model, (INPUT,), 1e-8)
    norms = {
        axis.path
        for space in graph.spaces
        for slot in space.slots
        if isinstance((axis := slot.axis).module, MeanOnlyBatchNorm)
    }
    assert len(norms) == len(trained_norms(model.train()))


# -- decay ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars"])
def test_the_decay_is_that_of_the_weight_and_no_direction_decays(optimizer: str) -> None:
    """A step without gradients is the decay alone."""
    config = morphtrain.compose(f"optimizer={optimizer}", "optimizer.weight_decay=0.1", "optimizer.lr=0.5").optimizer
    model = normed(ResNet(blocks=1, width=4))
    plain = folded(model)
    before = copy.deepcopy(model.state_dict())
    for network in (model, plain):
        stepping = options.build("optimizer", config, model=network)
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        stepping.step()
    assert sum(len(group["params"]) for group in options.build("optimizer", config, model=model).param_groups) == len(
        list(model.parameters())
    )
    for name, tensor in model.state_dict().items():
        kept = torch.equal(tensor, before[name])
        assert kept != name.endswith("original0"), name
    for path, layer in plain.named_modules():
        if isinstance(layer, MIXING):
            torch.testing.assert_close(effective(model.get_submodule(path)), layer.weight)


def test_a_network_without_it_has_the_groups_that_it_had() -> None:
    model = ResNet(blocks=1, width=4)
    weights, vectors = options.build("optimizer", morphtrain.compose().optimizer, model=model).param_groups
    assert [p for p in model.parameters() if p.dim() > 1] == weights["params"]
    assert [p for p in model.parameters() if p.dim() <= 1] == vectors["params"]


# -- pruning: the same as on a plain network of the same weights ----------------------------------------------


def pair() -> tuple[nn.Module, nn.Module, ChannelGraph, ChannelGraph]:
    """A network with weight norm, its plain twin, and their graphs."""
    model = normed(build(1, width=6))
    plain = folded(model)
    return model, plain, trace(model), trace(plain)


def assert_same_weights(model: nn.Module, plain: nn.Module, tolerance: float = 1e-12) -> None:
    for path, layer in plain.named_modules():
        if isinstance(layer, MIXING):
            found, wanted = effective(model.get_submodule(path)).detach(), layer.weight.detach()
            assert (found - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1), path
            assert torch.equal(found == 0, wanted == 0), path


def test_shrinking_takes_the_same_off_the_weight_and_leaves_the_norms_of_v() -> None:
    model, plain, graph, other = pair()
    lassos, plain_lassos = group_lassos(graph), group_lassos(other)
    lengths = [parts(layer)[1].flatten(1).norm(dim=1).clone() for layer in layers_of(model)]
    signs = [parts(layer)[0].sign() for layer in layers_of(model)]
    assert len(lassos) == len(plain_lassos) == len(layers_of(model))
    torch.testing.assert_close(penalty(lassos), penalty(plain_lassos))
    for amount in (0.1, 0.5, 1.0, 100.0):  # until rows and columns have gone, and at last all
        shrink(lassos, amount)
        shrink(plain_lassos, amount)
        assert_same_weights(model, plain)
    assert all(effective(layer).count_nonzero() == 0 for layer in layers_of(model)[:-1])
    for layer, length, sign in zip(layers_of(model), lengths, signs, strict=True):
        g, v = parts(layer)
        torch.testing.assert_close(v.flatten(1).norm(dim=1), length)
        assert bool(((g.sign() == sign) | (g == 0)).all())


def test_the_subgradient_is_that_of_the_weight() -> None:
    model, _, graph, _ = pair()
    lassos = group_lassos(graph)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    add_gradient(lassos, 0.7)
    for lasso, layer in zip(lassos, layers_of(model), strict=True):
        weight = effective(layer)
        rows, columns = weight.flatten(1).norm(dim=1).sum(), weight.transpose(0, 1).flatten(1).norm(dim=1).sum()
        value = 0.7 * (lasso.row_weight * rows + lasso.column_weight * columns)
        for part, grad in zip(parts(layer), torch.autograd.grad(value, parts(layer)), strict=True):
            torch.testing.assert_close(part.grad, 1 + grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side", [0, 1])
def test_the_amount_of_a_step_is_what_the_optimizer_would_take_off(side: int) -> None:
    """Lengths of very different rows: what a small step along the penalty's gradient does to the groups' norms."""
    layer = nn.Sequential(nn.Conv2d(48, 24, 3)).double()
    to_weight_norm(layer)
    g, v = parts(layer[0])
    with torch.no_grad():
        g.mul_(torch.logspace(-1, 1, 24).view(g.shape))
    lasso = GroupLasso(Normed(g, v, 0), 1.0 - side, float(side))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-4)
    expected = amount_of_step(lasso, optimizer, 0.3)[side]
    dims = [d for d in range(4) if d != side]
    before = value_of(lasso.weight).pow(2).sum(dims).sqrt()
    taken = torch.zeros_like(before)
    for group in range(len(before)):  # one group's penalty at a time
        twin = copy.deepcopy(layer)
        twin[0].weight.pow(2).sum(dims)[group].sqrt().mul(0.3).backward()
        with torch.no_grad():
            for part in parts(twin[0]):
                part -= 1e-4 * part.grad
        taken[group] = (before - twin[0].weight.detach().pow(2).sum(dims).sqrt())[group]
    torch.testing.assert_close(torch.as_tensor(expected).to(taken).expand_as(taken), taken, rtol=0.05, atol=0)


def test_adam_and_lars_give_every_weight_an_amount() -> None:
    for optimizer in ("adamw", "lars"):
        config = morphtrain.compose(f"optimizer={optimizer}").optimizer
        model = normed(ResNet(blocks=1, width=4))
        stepping = options.build("optimizer", config, model=model)
        F.cross_entropy(model(INPUT.float()), torch.arange(4)).backward()
        stepping.step()
        for lasso in group_lassos(ChannelGraph.trace(model, INPUT[:1].float())):
            amounts = amount_of_step(lasso, stepping, 0.1)
            assert all(bool((torch.as_tensor(amount) > 0).all()) for amount in amounts)
            shrink([lasso], amounts)
        assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_group_lasso_of_channels_is_the_length() -> None:
    model, plain, graph, other = pair()
    norms, plain_norms = ChannelNorms(graph, "group_lasso"), ChannelNorms(other, "group_lasso")
    assert [space.name for space in norms.spaces] == [space.name for space in plain_norms.spaces]
    for found, wanted in zip(norms.importance().values(), plain_norms.importance().values(), strict=True):
        torch.testing.assert_close(found, wanted)
    amounts = torch.rand(sum(norms.sizes), dtype=torch.double)
    norms.shrink(amounts)
    plain_norms.shrink(amounts)
    assert_same_weights(model, plain)
    assert not ChannelNorms(graph, "gamma_l1").spaces


def test_importance_is_that_of_the_weight() -> None:
    model, plain, graph, other = pair()
    for found, wanted in zip(magnitude(graph).values(), magnitude(other).values(), strict=True):
        torch.testing.assert_close(found, wanted)
    measured = []
    for network, its in ((model, graph), (plain, other)):
        taylor = Taylor()
        F.cross_entropy(network(INPUT), torch.arange(4)).backward()
        taylor.look(its)
        taylor.count()
        measured.append(taylor.importance(its).values())
    for found, wanted in zip(*measured, strict=True):
        assert bool(wanted.isfinite().all())
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-14)


def test_what_fades_is_zero_in_the_end_and_the_rest_is_as_it_was() -> None:
    model, plain, graph, other = pair()
    gone = {name: torch.arange(graph.space(name).size) % 3 == 0 for name in ("stem.0", "stages.0.0.branch.0")}
    fadings = [Fading(its, {its.space(name): mask for name, mask in gone.items()}, 1.0) for its in (graph, other)]
    for left in (0.7, 0.3, 0.0):
        for fading in fadings:
            fading.fade(left)
        assert_same_weights(model, plain)
    before = outputs(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fadings[0].cut(optimizer)
    for found, wanted in zip(outputs(model), before, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_what_lasso_has_made_zero_is_removed_and_the_function_stays() -> None:
    """Sliced against masked: of the channels and blocks that a strong penalty has emptied, in both modes."""
    model = ResNet(blocks=2, width=8).double().train()
    to_weight_norm(model)
    initialise(model, INPUT)
    graph = trace(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(40):
        F.cross_entropy(model(INPUT), torch.arange(4)).backward()
        optimizer.step()
        for lasso in group_lassos(graph):
            shrink([lasso], amount_of_step(lasso, optimizer, 0.5))
        optimizer.zero_grad()
    widths, before = {space.name: space.size for space in graph.spaces}, outputs(model)
    change = reconfigure(graph, threshold=1e-12, optimizer=optimizer)
    assert change.widths and sum(space.size for space in graph.spaces) < 0.8 * sum(widths.values())
    for found, wanted in zip(outputs(model), before, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    F.cross_entropy(model(INPUT), torch.arange(4)).backward()
    optimizer.step()
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


# -- growth: the function stays -------------------------------------------------------------------------------


@pytest.mark.parametrize("mean_only", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_widening_keeps_the_function(mean_only: bool, noise: float) -> None:
    model = normed(build(2, width=6), mean_only)
    graph, before = trace(model), outputs(model)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert widen(graph, 1.5, noise=noise, generator=generator, optimizer=optimizer)
    for found, wanted in zip(outputs(model), before, strict=True):
        assert (found - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    for layer in layers_of(model)[1:]:
        columns = effective(layer).detach().transpose(0, 1).flatten(1)
        assert (len(columns.unique(dim=0)) == len(columns)) == (noise > 0), "only uneven shares tell copies apart"
    assert params_at(graph)({}) == count_params(model)


@pytest.mark.parametrize("mean_only", [False, True])
def test_new_layers_and_blocks_are_exactly_the_identity(mean_only: bool) -> None:
    model = normed(build(2, width=6), mean_only).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    graph, before = trace(model), outputs(model)
    graph.insert_layer(graph.layer_places[0], [INPUT], optimizer=optimizer)
    for begin in ("zero_gamma", "half_half"):
        insert_block_like(graph, graph.stage_ends[0].path, [INPUT], begin, optimizer)
    for found, wanted in zip(outputs(model), before, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)
    F.cross_entropy(model(INPUT), torch.arange(4)).backward()
    optimizer.step()
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


# -- whole runs -----------------------------------------------------------------------------------------------


def run_of(*overrides: str) -> Run:
    run = build_run(morphtrain.compose(*SMALL, "tracking=none", "norm=weight", *overrides))
    start(run)
    return run


def trained(run: Run, epochs: int) -> Run:
    for _ in range(epochs):
        begin_epoch(run)
        train_epoch(run)
        finish_epoch(run)
    return run


def test_a_run_starts_from_its_first_batch_on_its_clock() -> None:
    run = build_run(morphtrain.compose(*SMALL, "tracking=none", "norm=weight"))
    state, seconds = torch.get_rng_state(), []
    run.norm_start = lambda model, images, start=run.norm_start: seconds.append(start(model, images))
    begun = run.clock.seconds["setup_seconds"]
    start(run)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(seconds) == 1 and run.clock.seconds["setup_seconds"] > begun
    images, _ = next(run.data.train_batches(run.batch_size, run.generator(0)))
    run.model.eval()
    for values in pass_of(run.model, images, MIXING).values():
        assert_standard(values)
    again, other = run_of(), run_of("seed=2")
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), again.model.parameters(), strict=True))
    assert not torch.equal(parts(layers_of(run.model)[0])[0], parts(layers_of(other.model)[0])[0])


def test_it_starts_on_images_of_the_size_that_the_first_epoch_shows() -> None:
    run = run_of("data.image_size=16", "data.progressive=0.5", "data.progressive_until=0.75")
    images, _ = next(run.data.train_batches(run.batch_size, run.generator(0)))
    small = F.interpolate(images, size=(8, 8), mode="bilinear", antialias=True)
    for values in pass_of(run.model.eval(), small, MIXING).values():
        assert_standard(values)


def test_new_random_weights_start_on_images_of_the_size_that_the_next_epoch_shows() -> None:
    run = trained(run_of("data.image_size=16", "data.progressive=0.5", "data.progressive_until=0.5"), 3)
    assert run.small_size(3) is not None and run.small_size(4) is None
    run.reset_weights()
    images, _ = next(run.data.train_batches(run.batch_size, run.generator(3)))
    for values in pass_of(run.model.eval(), images, MIXING).values():
        assert_standard(values)


def test_new_random_weights_start_as_the_first_ones_do() -> None:
    run = trained(run_of(), 1)
    before = {id(v): v.clone() for _, v in map(parts, layers_of(run.model))}
    run.reset_weights()
    assert not any(torch.equal(v, before[id(v)]) for _, v in map(parts, layers_of(run.model)))
    images, _ = next(run.data.train_batches(run.batch_size, run.generator(run.epoch)))
    for values in pass_of(run.model.eval(), images, MIXING).values():
        assert_standard(values)
    plain, model = VGG(depth=8, width=4), VGG(depth=8, width=4)
    to_weight_norm(model)
    for network in (plain, model):
        torch.manual_seed(3)
        fresh_weights(network)
    for path, layer in plain.named_modules():
        if isinstance(layer, nn.Conv2d):  # drawn as those of a plain network, from the same numbers
            torch.testing.assert_close(effective(model.get_submodule(path)), layer.weight)


@pytest.mark.parametrize("options", [(), ("norm.mean_only=true",)])
def test_a_run_is_pruned_and_its_file_gives_the_same_network(options: tuple[str, ...], tmp_path: Path) -> None:
    run = trained(run_of(*options), 4)
    assert len(run.changes) > 1
    assert run.history[-1]["channel_density"] < 0.9
    checkpoint.save(run, tmp_path, None)
    network = networks.load(networks.read(tmp_path / checkpoint.LAST), None)
    images = torch.randn(5, 3, 8, 8)
    run.model.eval()
    with torch.no_grad():
        wanted = run.model(images)
        assert torch.equal(network(images), wanted)
    for kind in ("torch_export", "state_dict"):
        written = export(
            network, tmp_path / f"net.{kind}", kind, checkpoint.Checkpoint(tmp_path / checkpoint.LAST).preprocessing()
        )
        assert written.difference < 1e-5
    assert layers_of(network), "an export leaves the network that it is given as it is"
    values = torch.load(tmp_path / "net.state_dict", weights_only=True)
    assert not any("parametrizations" in name for name in values)
    plain = folded(network)
    plain.load_state_dict(values)
    with torch.no_grad():
        torch.testing.assert_close(plain(images), wanted)
    architecture = json.loads((tmp_path / "net.architecture.json").read_text())
    assert architecture["shapes"] == describe(plain)["shapes"]


@pytest.mark.parametrize(
    "options",
    [
        ("prune=early", "prune.target=0.5", "prune.by=0.5", "prune.round_to=1"),
        ("prune=early", "prune.target=0.5", "prune.by=0.5", "prune.importance=taylor", "prune.round_to=1"),
        ("prune=morphnet", "prune.regulariser=group_lasso", "prune.start_epoch=1", "optimizer=lars"),
        ("prune=none", "grow=wider", "grow.at_epochs=[1]", "precision=bf16", "memory_format=channels_last"),
        ("prune=none", "grow=deeper", "grow.at_epochs=[1]", "clip_norm=1", "data.infobatch=0.5"),
    ],
)
def test_it_goes_together_with_other_options(options: tuple[str, ...]) -> None:
    own = [o for o in SMALL if not o.startswith("prune")]
    run = build_run(morphtrain.compose(*own, "epochs=3", "tracking=none", "norm=weight", *options))
    start(run)
    trained(run, 3)
    assert np.isfinite(run.history[-1]["train_loss"])
    assert all(bool(parameter.isfinite().all()) for parameter in run.model.parameters())


def test_costs_are_those_of_the_weights() -> None:
    plain, model = ResNet(blocks=1, width=8), ResNet(blocks=1, width=8)
    to_weight_norm(model)
    shape = (3, 16, 16)
    assert count_macs(model, shape) == count_macs(plain, shape)
    graphs = [ChannelGraph.trace(network, torch.zeros(1, *shape)) for network in (model, plain)]
    for kind in ("flops", "model_size"):
        assert WidthCost(graphs[0], kind)() == WidthCost(graphs[1], kind)()
    less, more = (estimate_memory(network, shape, 64) for network in (model, plain))
    assert 0 < less < more, "batch norm's activations are not kept"


def test_no_norm_is_computed_in_16_bits() -> None:
    """Under autocast the weight is computed as ever, and cast then."""
    model = normed(nn.Sequential(nn.Conv2d(3, 4, 3)))
    exact = model[0].weight.detach().clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model[0].weight, exact)
        assert model(torch.randn(2, 3, 5, 5)).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (("prune=morphnet",), "prune.regulariser=group_lasso works"),
        (("prune=early", "prune.importance=gamma"), "prune.importance=magnitude works"),
    ],
)
def test_what_needs_a_gamma_is_refused(overrides: tuple[str, ...], wanted: str) -> None:
    with pytest.raises(UserError, match="norm=weight") as error:
        morphtrain.compose("norm=weight", *overrides)
    assert wanted in str(error.value) and "\n" not in str(error.value)


def test_it_computes_in_channels_last_where_batch_norm_does() -> None:
    """Of gray images, too, whose memory format says nothing: there the weights decide."""
    formats = []
    for overrides in ((), ("norm=weight",)):
        keys = ["data=digits", "model.width=8", "memory_format=channels_last", "tracking=none", *overrides]
        run = build_run(morphtrain.compose(*keys))
        found: list[torch.Tensor] = []
        layers = [m for m in run.model.modules() if isinstance(m, nn.Conv2d)]
        for layer in layers:
            layer.register_forward_hook(lambda m, args, out, found=found: found.append(out))
        run.model(next(run.data.train_batches(16, run.generator(0)))[0]).sum().backward()
        formats.append([out.is_contiguous(memory_format=torch.channels_last) for out in found])
        assert len(found) == len(layers)
    assert formats[0] == formats[1] and all(formats[0])


def test_steps_that_may_be_too_long_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    run_of()
    assert [message for message in caplog.messages if "clip_norm=1" in message and "optimizer.lr=0.1" in message]
    caplog.clear()
    for option in ("clip_norm=1", "optimizer.lr=0.03", "optimizer=adamw"):
        run_of(option)
    assert not [message for message in caplog.messages if "clip_norm" in message]
