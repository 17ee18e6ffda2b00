"""Idioms of real networks: what code does with what calls return, with weights that are computed, with its layers."""

from __future__ import annotations

import copy
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from networks import assert_close, check_surgery, facts, outputs
from test_widths_in_code import Body
from topologies import images
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from morphtrain.cost import estimate_memory
from morphtrain.morph import ChannelGraph, MorphError
from morphtrain.trainer.build import follow_channels

X = images()
KERNEL = torch.outer(torch.tensor([1.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 1.0])).div(16).double()


class Net(Body):
    """`Body` with more that its function may use."""

    def __init__(self, function, out: int = 8) -> None:
        super().__init__(function, out)
        self.halves = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.seq = nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 8, 1), nn.ReLU())
        self.wide, self.ups = nn.Linear(8, 8 * 4), nn.ConvTranspose2d(8, 7, 2, 2)
        self.eca, self.norm = nn.Conv1d(1, 1, 3, padding=1), nn.BatchNorm2d(8)
        self.circular, self.reflect = nn.CircularPad2d(1), nn.ReflectionPad3d((0, 0, 1, 1, 0, 0))
        self.response, self.pads = nn.LocalResponseNorm(3), nn.ConstantPad3d(1, 0.5)
        self.register_buffer("blur", KERNEL.expand(8, 1, 3, 3).clone())
        self.register_buffer("one_blur", KERNEL[None, None].clone())
        self.register_buffer("mix", torch.randn(8, 8, 1, 1).double())
        self.register_buffer("image_blur", KERNEL.expand(3, 1, 3, 3).clone())


def csp(m: Net, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    parts = list(y.chunk(2, 1))
    parts.extend(half(parts[-1]) for half in m.halves)
    return torch.cat(parts, 1)


def drop_path(m: Net, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """As in timm, where it does not drop."""
    shape = (y.shape[0],) + (1,) * (y.ndim - 1)
    return x + y * y.new_empty(shape).bernoulli_(1.0).div_(1.0)


def response(m: Net, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """GRN of ConvNeXt V2."""
    norm = y.norm(p=2, dim=(2, 3), keepdim=True)
    return y * (norm / (norm.mean(1, keepdim=True) + 1e-6)) + y


def eca(m: Net, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    weights = m.eca(y.mean((2, 3)).view(y.shape[0], 1, -1)).sigmoid()
    return y * weights.view(y.shape[0], -1, 1, 1).expand_as(y)


def generator(m: Net, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Linear, view, norm, transposed convolution."""
    return m.ups(m.norm(m.wide(y.mean((2, 3))).view(y.shape[0], -1, 2, 2)))


# name -> (function, the channels that `head` reads, sizes of the spaces: written by hand)
FOLLOWED = {
    "cat by axis": (lambda m, x, y: torch.cat([x, y], axis=1), 16, [8, 8]),
    "stack by axis": (lambda m, x, y: torch.stack([x, y], axis=2).sum(axis=2), 8, [8]),
    "mean by axis": (lambda m, x, y: y - torch.mean(x, axis=(2, 3), keepdims=True), 8, [8]),
    "softmax by axis": (lambda m, x, y: torch.softmax(y, axis=2), 8, [8, 8]),
    "channel mean by axis": (lambda m, x, y: x * y.mean(axis=1, keepdims=True), 8, [8]),
    "x for input": (lambda m, x, y: torch.sum(x=y, axis=(2, 3), keepdims=True), 8, [8, 8]),
    "chunk by axis": (lambda m, x, y: torch.cat(torch.chunk(y, 2, dim=1)[::-1], dim=1), 8, [8, 4]),
    "list of chunk": (csp, 16, [4, 4, 4, 8]),
    "loop over split": (lambda m, x, y: sum(p for p in y.split(y.shape[1] // 2, 1)), 4, [8, 4]),
    "zip of chunks": (
        lambda m, x, y: torch.cat([h(p) for h, p in zip(m.halves, y.chunk(2, 1), strict=True)], 1), 8, [4, 4, 4, 8]
    ),
    "chunks as arguments": (lambda m, x, y: torch.maximum(*y.chunk(2, dim=1)), 4, [8, 4]),
    "how many chunks": (lambda m, x, y: y / len(y.chunk(4, 1)), 8, [2, 8]),
    "cat of split": (lambda m, x, y: torch.cat(y.split(2, 1)[::-1], 1), 8, [8]),
    "cat of split by name": (lambda m, x, y: torch.cat(tensors=y.split(2, 1)[1:], dim=1), 6, [8]),
    "unbind": (lambda m, x, y: torch.stack([r.relu() for r in y.unbind(2)], 2), 8, [8, 8]),
    "unbind channels": (lambda m, x, y: torch.stack(y.unbind(1)[::-1], 1), 8, [8]),
    "star of a shape": (lambda m, x, y: y.flatten(2).view(*x.shape[:2], *y.shape[2:]), 8, [8]),
    "dimensions asked": (lambda m, x, y: x + y if y.dim() == 4 and len(x.shape) == 4 else y, 8, [8]),
    "view_as": (lambda m, x, y: y.flatten(2).view_as(x), 8, [8]),
    "blur": (lambda m, x, y: F.conv2d(F.pad(y, (1, 1, 1, 1), "reflect"), m.blur, groups=y.shape[1]), 8, [8, 8]),
    "blur by another's width": (lambda m, x, y: F.conv2d(y, m.blur, groups=x.shape[1]), 8, [8]),
    "blur by a constant": (lambda m, x, y: F.conv2d(y, m.blur, groups=8), 8, [8]),
    "blur by copies": (
        lambda m, x, y: F.conv2d(y, m.one_blur.repeat(y.shape[1], 1, 1, 1), groups=y.shape[1]), 8, [8, 8]
    ),
    "blur upwards": (lambda m, x, y: F.conv_transpose2d(y, m.blur, stride=2, groups=y.shape[1]), 8, [8, 8]),
    "fixed filter": (lambda m, x, y: F.conv2d(y, m.mix), 8, [8]),
    "linear to transposed": (generator, 7, [8, 8, 8, 7]),
    "drop path": (drop_path, 8, [8]),
    "global response norm": (response, 8, [8]),
    "channel attention": (eca, 8, [8]),
    "local response norm": (lambda m, x, y: m.response(y) + F.local_response_norm(x, 3), 8, []),
    "circular padding": (lambda m, x, y: m.circular(y), 8, [8, 8]),
    "3d paddings": (lambda m, x, y: m.reflect(y[:, :, None])[:, :, 0] + m.pads(x[:, :, None])[:, :, 1, 1:-1, 1:-1]
                    .repeat(1, 1, 1, 1)[:, :, :8, :8].mean((2, 3), keepdim=True), 8, [8]),
    "circular padding of the channels": (
        lambda m, x, y: F.pad(y[:, None], (0, 0, 0, 0, 1, 1), "circular")[:, 0], 10, [8]
    ),
    "part of a Sequential": (lambda m, x, y: m.seq[2:](m.seq[:2](y)), 8, [8, 8, 6, 8]),
    "linear over positions": (lambda m, x, y: m.wide(y), 8, [8]),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLLOWED)
def test_idioms_are_followed(name: str) -> None:
    function, out, sizes = FOLLOWED[name]
    torch.manual_seed(0)
    graph = ChannelGraph.trace(Net(function, out).double(), images())
    assert sorted(space.size for space in graph.spaces) == sorted(sizes)
    check_surgery(Net(function, out), (images(),), tolerance=1e-8, spaces=bool(sizes))


class BlurredImage(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.conv2d(x, self.image_blur, padding=1, groups=x.shape[1]))


def test_a_filter_of_the_image_stays() -> None:
    graph = check_surgery(BlurredImage(lambda m, x, y: y), (X,), tolerance=1e-8)
    assert len(graph.spaces) == 2


class Symmetric(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + weight.transpose(0, 1)


def old_norm(norm, layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return norm(layer)


COMPUTED = {
    "symmetric": lambda: nn.utils.parametrize.register_parametrization(nn.Conv2d(8, 8, 1), "weight", Symmetric()),
    "weight norm by hooks": lambda: old_norm(nn.utils.weight_norm, nn.Conv2d(8, 8, 1)),
    "spectral norm by hooks": lambda: old_norm(nn.utils.spectral_norm, nn.Conv2d(8, 8, 1)),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_layers_whose_computed_weight_cannot_follow_are_kept_and_the_rest_is_not(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), COMPUTED[name](), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 5, 1)).double()
    before, names = facts(model, SGD(model.parameters(), 0.1)), vars(model[1]).keys()
    expected = outputs(model, (X,))
    graph = ChannelGraph.trace(model, X)
    assert [(s.name, s.size) for s in graph.spaces] == [("2", 6)]
    assert graph.kept["1"].startswith("all: its weight is computed by")
    if "hooks" in name:
        assert graph.kept["1"].endswith("the norms of torch.nn.utils.parametrizations are followed")
    assert facts(model, SGD(model.parameters(), 0.1)) == before
    assert vars(model[1]).keys() == names
    assert all(not tensor.is_meta for tensor in vars(model[1]).values() if isinstance(tensor, torch.Tensor))
    if "spectral" not in name:  # which takes a step of its power iteration in every pass
        assert_close(outputs(model, (X,)), expected, 0.0)
    graph.reindex(graph.spaces[0], range(4))
    assert model(X).shape == (len(X), 5, 8, 8)


REFUSED = {
    "a loop over the batch": (lambda m, x, y: torch.stack([r for r in y]), "samples"),
    "a loop over chunks of the batch": (lambda m, x, y: torch.cat(list(y.chunk(5, 0))), "samples"),
    "an assertion": (lambda m, x, y: (torch._assert(y.shape[-1] == 3, "three rows"), y)[1], "three rows"),
    "a layer made in forward": (lambda m, x, y: nn.ReLU()(y), "ReLU is called, but is not held"),
    "one sample": (lambda m, x, y: y.view(1, 8, 8, 8), "as a batch of 2"),
    "a stride of a width": (lambda m, x, y: F.conv2d(y, m.mix, stride=x.shape[1]), "number of channels"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_named(name: str) -> None:
    function, reason = REFUSED[name]
    with pytest.raises(MorphError, match=reason):
        ChannelGraph.trace(Net(function).double(), X)


class Storing(Net):
    """Keeps activations, as for Grad-CAM, in several ways."""

    def __init__(self, **options: object) -> None:
        super().__init__(lambda m, x, y: y)
        self.feature, self.features, self.seen = None, [], {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.feature = self.b(self.a(x))
        self.features[:] = [self.feature.relu(), (self.feature.abs(),)]
        self.seen["last"] = self.a.seen = self.feature.mean()
        return super().forward(x)


def test_a_network_that_stores_activations_is_traced_copied_and_measured() -> None:
    model = Storing().double()
    model(X).sum().backward()
    feature, first = model.feature, model.features[0]
    with pytest.raises(RuntimeError):
        copy.deepcopy(model)
    graph = ChannelGraph.trace(model, X)
    assert model.feature is feature and model.features[0] is first
    assert isinstance(model.a.seen, torch.Tensor)
    twin = copy.deepcopy(graph)
    assert torch.equal(twin.model(X), model(X))
    twin.reindex(twin.spaces[0], range(3))
    assert twin.model(X).shape == model(X).shape
    memory = estimate_memory(Storing(), (3, 8, 8), batch_size=4)
    assert memory > 0


class Grows(nn.Module):
    """Calls its layers in ways that not every module can be called in, and reads what they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 8, 3, padding=1)
        self.two, self.last = nn.Identity(), nn.LayerNorm(8)
        self.up, self.read = Joined(), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.a(x)).relu()
        y = self.b(input=x).relu() * self.b.out_channels / self.b.kernel_size[0]
        y = self.read(self.up(y, x)) * self.read.weight.view(1, -1, 1, 1)
        return self.head(self.last(y.permute(0, 2, 3, 1))).mean((1, 2))


class Joined(nn.Module):
    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return (x + skip).relu()


def test_insertions_work_wherever_they_are_offered() -> None:
    torch.manual_seed(0)
    base = Grows().double()
    graph = ChannelGraph.trace(base, X)
    assert {"last", "up"}.isdisjoint(graph.block_places), "channels last, and two arguments"
    assert {"a", "norm", "b", "read"} <= set(graph.block_places) and graph.layer_places == ["b"]
    for path in graph.block_places:
        for start in ("zero_gamma", "half_half"):
            model = copy.deepcopy(base)
            expected = outputs(model, (X,))
            grown = ChannelGraph.trace(model, X)
            grown.insert_block(path, [X], start=start)
            assert_close(outputs(model, (X,)), expected, 1e-8)
            assert len(ChannelGraph.trace(model, X).spaces) >= len(graph.spaces)
    model = copy.deepcopy(base)
    expected = outputs(model, (X,))
    ChannelGraph.trace(model, X).insert_layer("b", [X])
    assert_close(outputs(model, (X,))[1:] * 2, expected[1:] * 2, 1e-8)
    model(X).sum().backward()


def test_wrappers_are_taken_off() -> None:
    model = Net(lambda m, x, y: y).double()
    compiled = torch.compile(model, backend="eager")
    for wrapper in (nn.DataParallel(model), compiled, nn.DataParallel(compiled)):
        graph = ChannelGraph.trace(wrapper, X)
        assert graph.model is model
        assert len(graph.spaces) == 2
    graph = ChannelGraph.trace(compiled, X)
    graph.reindex(graph.spaces[0], range(3))
    assert torch.allclose(compiled(X), model(X))


class Frozen(nn.Module):
    """As torchvision's FrozenBatchNorm2d."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.rand(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight.reshape(1, -1, 1, 1)


KEPT = {
    "a view of a buffer": (lambda m, x, y: m.frozen(y), "b", r"all: operation 'mul' in frozen"),
    "a slice": (lambda m, x, y: y[:, :8], "b", "all: operation 'getitem' in the forward of the model"),
    "a part": (lambda m, x, y: torch.cat([y[:, :2], x], 1), "b", "2 of 8 channels: operation 'getitem'"),
    "through a sum": (lambda m, x, y: m.response(x + y), "a", r"all: module 'response' \(LocalResponseNorm\)"),
    "the other way": (lambda m, x, y: m.response(x + y), "b", r"all: module 'response' \(LocalResponseNorm\)"),
    "a width that is read": (lambda m, x, y: y * m.b.out_channels, "b", "all: code reads out_channels"),
    "the image": (lambda m, x, y: y + m.image, "b", "all: operation 'add'"),
}


@pytest.mark.parametrize("name", KEPT)
def test_the_graph_says_what_is_kept_and_why(name: str) -> None:
    function, path, why = KEPT[name]
    model = Net(function, 10 if name == "a part" else 8)
    model.frozen, model.image = Frozen(8), torch.zeros(8, 1, 1)
    graph = ChannelGraph.trace(model, X.float())
    assert re.match(why, graph.kept[path]), graph.kept
    assert f"kept: {path}, {graph.kept[path]}" in repr(graph)
    assert graph.kept["head"] == "all: the network's output"
    free = {slot.axis.path for space in graph.spaces for slot in space.slots if slot.role == "produces"}
    assert free | set(graph.kept) >= {"a", "b", "head"}
    assert all(not graph.kept[path].startswith("all") for path in free & set(graph.kept))


def test_a_run_says_it_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    methods = {"prune": SimpleNamespace(ignore=(), follows_channels=True)}
    with caplog.at_level("INFO"):
        follow_channels(None, Net(lambda m, x, y: m.response(x + y)), (3, 8, 8), methods)
        follow_channels(None, Net(lambda m, x, y: x + y), (3, 8, 8), methods)  # only the last layer: not a word
    (message,) = caplog.messages
    assert message.startswith("channels that cannot change: a, all: module 'response' (LocalResponseNorm); b, all")
    assert "\n" not in message
