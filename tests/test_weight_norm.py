"""Weight norm: what it starts from, what decays, and whole runs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from weight_normed import NETWORKS, SLOW, Own, folded, layers_of, normed, parts

import morphtrain
from morphtrain import options
from morphtrain.cost import WidthCost, count_macs, estimate_memory
from morphtrain.errors import UserError
from morphtrain.export.write import export
from morphtrain.initialise import fresh_weights
from morphtrain.model import ResNet
from morphtrain.model.vgg import VGG
from morphtrain.morph import MIXING, ChannelGraph, describe
from morphtrain.morph.effective import effective
from morphtrain.norm.mean_only import MeanOnlyBatchNorm
from morphtrain.norm.weight import initialise, to_weight_norm
from morphtrain.state import Run
from morphtrain.trainer import begin_epoch, build_run, checkpoint, finish_epoch, networks, start, train_epoch


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
