"""Number formats in the layers of a network: what they compute in, and what follows when it is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from number_formats import BRAIN, HALF, config_of
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from morphtrain.errors import UserError
from morphtrain.grow import widen
from morphtrain.model import VGG, AlexNet, MobileNet, ResNet
from morphtrain.morph import ChannelGraph, Gate, ZeroBranch, input_type
from morphtrain.norm.ghost import to_ghost
from morphtrain.precision.casting import Cast, Casting
from morphtrain.precision.o3 import Short
from morphtrain.prune.lasso import GroupLasso, add_gradient, penalty
from morphtrain.trainer.build import build_run

CPU = torch.device("cpu")
SIDES = {"vgg": 32, "alexnet": 32}  # pixels of an image, where 8 are too few


class Seen(Cast):
    """Notes the types that layers are called with, before they are cast."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.inputs: list[torch.dtype] = []
        self.weights: set[torch.dtype] = set()

    def call(self, layer: Any, x: torch.Tensor, weight: torch.Tensor, bias: Any, *rest: Any, **keywords: Any) -> Any:
        self.inputs.append(x.dtype)
        self.weights.add(weight.dtype)
        return super().call(layer, x, weight, bias, *rest, **keywords)


def ghost() -> nn.Module:
    model = ResNet(blocks=1, width=4)
    to_ghost(model, 2)
    return model


def own_layers() -> nn.Module:
    """Norms that are no batch norm, PReLU, a depthwise and a transposed convolution."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.PReLU(4),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        nn.ConvTranspose2d(4, 4, 3),
        nn.Flatten(),
        nn.LayerNorm(256),
        nn.Linear(256, 64),
        nn.BatchNorm1d(64),
        nn.RMSNorm(64),
        nn.Linear(64, 10),
    )


def gated() -> nn.Module:
    model = ResNet(blocks=2, width=8)
    graph = ChannelGraph.trace(model, torch.zeros(1, 3, 8, 8))
    some = torch.tensor([0, 2, 3])
    graph.gate({"stages.0.1.branch.0": Gate(reads=some), "stages.0.1.branch.3": Gate(writes=some)})
    return model


def removed() -> nn.Module:
    model = ResNet(blocks=2, width=4)
    graph = ChannelGraph.trace(model, torch.zeros(1, 3, 8, 8))
    graph.remove_block(next(block for block in graph.blocks if block.path.startswith("stages.1")))
    assert any(isinstance(module, ZeroBranch) for module in model.modules())
    return model


def grown() -> nn.Module:
    model = ResNet(blocks=1, width=4)
    graph = ChannelGraph.trace(model, torch.zeros(1, 3, 8, 8))
    graph.insert_block(graph.stage_ends[0].path, [torch.randn(4, 3, 8, 8)], start="half_half")
    graph.insert_layer(graph.layer_places[-1], [torch.randn(4, 3, 8, 8)])
    return model


NETS: dict[str, Callable[[], nn.Module]] = {
    "padding shortcuts": lambda: ResNet(blocks=1, width=4, shortcut="A"),
    "bottlenecks": lambda: ResNet(blocks=1, width=4, shortcut="B", bottleneck=True, layers=3),
    "vgg": lambda: VGG(depth=8, width=4, dropout=0.3),
    "alexnet": lambda: AlexNet(dropout=0.3),
    "depthwise": lambda: MobileNet(version=1, width_multiplier=0.25),
    "inverted residuals": lambda: MobileNet(version=2, width_multiplier=0.25),
    "ghost norm": ghost,
    "other layers": own_layers,
    "gated": gated,
    "removed": removed,
    "grown": grown,
}


@pytest.mark.parametrize("dtype", [BRAIN, HALF])
@pytest.mark.parametrize("name", NETS)
def test_all_of_a_network_flows_in_sixteen_bits(name: str, dtype: torch.dtype) -> None:
    """No sum, norm or factor of 32 bits promotes what follows it; gradients have the type of their parameters."""
    torch.manual_seed(0)
    model, mode = NETS[name](), Seen(dtype)
    if name == "alexnet" and dtype is HALF:
        pytest.skip("emulated, it takes seconds")
    outputs: dict[str, torch.dtype] = {}
    for path, module in model.named_modules():
        module.register_forward_hook(lambda m, x, y, path=path: outputs.update({path: y.dtype}))
    images = torch.randn(4, 3, *[SIDES.get(name, 8)] * 2)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        mode.inputs = []
        with mode:
            logits = model.train()(images.to(memory_format=memory_format))
        assert mode.inputs == [torch.float32] + [dtype] * (len(mode.inputs) - 1)
        assert len(mode.inputs) > 3 and mode.weights == {torch.float32}
        assert {path: kind for path, kind in outputs.items() if kind is not dtype} == {}
    F.cross_entropy(logits.float(), torch.tensor([0, 1, 2, 3])).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(g.dtype is torch.float32 and g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)
    with mode, torch.no_grad():
        assert model.eval()(images).dtype is dtype
    reference = model(images)
    error = (logits_of(model, images, mode) - reference).norm() / reference.norm()
    assert error < 40 * torch.finfo(dtype).eps


@torch.no_grad()
def logits_of(model: nn.Module, images: torch.Tensor, mode: Cast) -> torch.Tensor:
    with mode:
        return model(images).float()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_parameters_of_sixteen_bits_train(name: str, keep: bool) -> None:
    """As in o3: images of 32 bits go in, and everything has its type; with and without the mode it computes alike."""
    torch.manual_seed(0)
    model = NETS[name]()
    optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
    precision = Short(CPU, BRAIN, keep_batchnorm_fp32=keep)
    before = list(model.parameters())
    precision.prepare(model, optimizer)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    for module in model.modules():
        wanted = torch.float32 if keep and "BatchNorm" in type(module).__name__ else BRAIN
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        assert all(t.dtype is wanted for t in tensors if t.is_floating_point()), type(module)
    images, labels = torch.randn(4, 3, *[SIDES.get(name, 8)] * 2), torch.tensor([0, 1, 2, 3])
    with precision.autocast():
        loss = F.cross_entropy(model.train()(images).float(), labels)
    precision.backward(loss, optimizer)
    assert precision.step(optimizer)
    assert all(t.isfinite().all() for t in (*model.parameters(), *model.buffers()))
    assert input_type(model) is BRAIN
    if name != "other layers" or not keep:
        assert model.eval()(images.to(BRAIN)).dtype is BRAIN


def test_a_removed_branch_adds_in_the_type_of_what_it_adds_to() -> None:
    branch = ZeroBranch(4, bias=nn.Parameter(torch.arange(4.0)))
    x = torch.randn(2, 4, 3, 3, dtype=BRAIN)
    assert (branch(x) + x).dtype is BRAIN
    assert torch.equal(branch(x.float()).flatten(), torch.arange(4.0))


def test_the_step_of_masters_is_that_of_an_independent_account() -> None:
    """A layer of 16 bits by hand; the gradients of its weights, unscaled, are what the optimizer gets."""
    torch.manual_seed(0)
    layer, x, labels = nn.Linear(5, 3), torch.randn(8, 5), torch.randint(3, (8,))
    low = [tensor.detach().to(HALF).requires_grad_() for tensor in (layer.weight, layer.bias)]
    logits = (x.to(HALF) @ low[0].t() + low[1]).float()
    (1024.0 * F.cross_entropy(logits, labels)).backward()
    wanted = [tensor.grad.float() / 1024 for tensor in low]
    precision = Casting(CPU, HALF, init_scale=1024.0)
    optimizer = SGD(layer.parameters(), lr=0.5)
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    with precision.autocast():
        out = layer(x)
    precision.backward(F.cross_entropy(out.float(), labels), optimizer)
    for parameter, gradient in zip(layer.parameters(), wanted, strict=True):
        assert parameter.grad.dtype is torch.float32
        torch.testing.assert_close(parameter.grad, gradient, rtol=2e-3, atol=1e-6)
    assert precision.step(optimizer)
    for parameter, old in zip(layer.parameters(), before, strict=True):
        assert torch.equal(parameter, old - 0.5 * parameter.grad)


@pytest.mark.parametrize("keep", [False, True])
def test_what_grows_has_the_types_that_are_there(keep: bool) -> None:
    torch.manual_seed(0)
    model = ResNet(blocks=1, width=4)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    precision = Short(CPU, BRAIN, keep_batchnorm_fp32=keep)
    precision.prepare(model, optimizer)
    images = torch.randn(8, 3, 8, 8)
    graph = ChannelGraph.trace(model, torch.zeros(1, 3, 8, 8, dtype=BRAIN))
    model.eval()
    before = model(images.to(BRAIN)).float()
    with precision.autocast():
        graph.insert_layer(graph.layer_places[-1], [images], optimizer=optimizer)
        graph.insert_block(graph.stage_ends[0].path, [images], optimizer=optimizer)
        graph.insert_block(graph.stage_ends[-1].path, [images], start="half_half", optimizer=optimizer)
    widen(graph, factor=2, optimizer=optimizer)
    for path, module in model.named_modules():
        wanted = torch.float32 if keep and isinstance(module, nn.BatchNorm2d) else BRAIN
        assert all(p.dtype is wanted for p in module.parameters(recurse=False)), path
    assert {id(p) for p in model.parameters()} == {id(p) for group in optimizer.param_groups for p in group["params"]}
    after = model(images.to(BRAIN)).float()
    assert (after - before).norm() < 0.1 * before.norm()


def test_a_trace_is_the_same_inside_the_context() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.free = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1)
            self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.conv2d(self.first(x), self.free.weight, self.free.bias)
            return self.head(self.norm(x).mean((2, 3)))

    model = Functional()
    plain = ChannelGraph.trace(model, torch.zeros(1, 3, 8, 8))
    with Cast(BRAIN):
        inside = ChannelGraph.trace(model, torch.zeros(1, 3, 8, 8))
    assert [(s.name, s.size, len(s.slots)) for s in inside.spaces] == [
        (s.name, s.size, len(s.slots)) for s in plain.spaces
    ]
    assert plain.spaces


def test_the_lasso_counts_in_32_bits() -> None:
    weight = nn.Parameter(torch.full((4, 3, 3, 3), 1e-4, dtype=HALF))  # squares of which are zero in 16
    exact = nn.Parameter(weight.detach().float())
    lassos = [GroupLasso(w, 1.0, 1.0) for w in (weight, exact)]
    assert torch.equal(penalty(lassos[:1]), penalty(lassos[1:]))
    for lasso in lassos:
        lasso.weight.grad = torch.zeros_like(lasso.weight)
        add_gradient([lasso], 0.1)
    torch.testing.assert_close(weight.grad.float(), exact.grad, rtol=1e-3, atol=1e-6)


class Multiplied(nn.Module):
    """A network whose code uses a weight by itself, which no layer casts."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body, self.weight = nn.Conv2d(3, 4, 3), nn.Parameter(torch.randn(num_classes, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).mean((2, 3)) @ self.weight.t()


def test_a_network_that_the_format_cannot_compute_is_one_line() -> None:
    own = ("model=custom", "model._target_=test_precision_layers.Multiplied")
    build_run(config_of(*own))
    with pytest.raises(UserError, match=r"^precision=o2: cannot take images of \(3, 8, 8\) in training mode") as error:
        build_run(config_of(*own, "precision=o2"))
    assert "\n" not in str(error.value)
