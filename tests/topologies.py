"""Small networks that isolate one way each in which channels meet; `TOPOLOGIES` maps a name to (network, inputs)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F


def conv(i: int, o: int, k: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


class Net(nn.Module):
    """A stem of `width` channels, `body`, global pooling, a classifier of `out` channels; the body is the topology."""

    def __init__(self, width: int = 8, out: int = 8) -> None:
        super().__init__()
        self.stem = conv(3, width)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(out, 5)

    def body(self, x):
        return x

    def forward(self, x):
        x = self.body(torch.relu(self.norm(self.stem(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class DenseBlock(Net):
    def __init__(self):
        super().__init__(8, 14)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 3 * i) for i in range(2))
        self.convs = nn.ModuleList(conv(8 + 3 * i, 3, bias=False) for i in range(2))

    def body(self, x):
        for norm, layer in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, layer(norm(x).relu())], 1)
        return x


class Inception(Net):
    def __init__(self):
        super().__init__(8, 15)
        self.a, self.b, self.c = conv(8, 4, 1), conv(8, 6), conv(8, 5, 5)

    def body(self, x):
        return torch.cat((self.a(x), self.b(F.max_pool2d(x, 3, 1, 1)), self.c(x)), dim=1)


class Chunked(Net):
    def __init__(self):
        super().__init__(8, 9)
        self.left, self.right = conv(4, 5), conv(4, 4)

    def body(self, x):
        left, right = x.chunk(2, dim=1)
        return torch.cat([self.left(left), self.right(right)], 1)


class Split(Net):
    """Halves by a size that the code computes; then a split by constants, which keeps what it splits."""

    def __init__(self):
        super().__init__(8, 6)
        self.mix = conv(4, 9)
        self.left, self.right = conv(3, 6), conv(6, 6)

    def body(self, x):
        half = x.shape[1] // 2
        x = self.mix(x[:, :half] * torch.sigmoid(x[:, half:]))
        left, right = torch.split(x, [3, 6], 1)
        return self.left(left) + self.right(right)


class Shuffled(Net):
    """The unit of ShuffleNet v2."""

    def __init__(self):
        super().__init__(8, 8)
        self.branch = nn.Sequential(conv(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 6, groups=6), conv(6, 4, 1))

    def body(self, x):
        a, b = x.chunk(2, dim=1)
        x = torch.cat((a, self.branch(b)), 1)
        n, c, h, w = x.size()
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class ShuffleLayer(Net):
    def __init__(self):
        super().__init__(12, 12)
        self.block = nn.Sequential(conv(12, 12, 1, groups=3), nn.ChannelShuffle(3), conv(12, 12, groups=3))

    def body(self, x):
        return self.block(x)


class Grouped(Net):
    def __init__(self):
        super().__init__(12, 16)
        self.grouped = conv(12, 8, groups=4)
        self.norm2 = nn.BatchNorm2d(8)
        self.last = conv(8, 16, groups=2)

    def body(self, x):
        return self.last(self.norm2(self.grouped(x)).relu())


class Depthwise(Net):
    """One output a channel, then three (a channel multiplier)."""

    def __init__(self):
        super().__init__(8, 24)
        self.one = conv(8, 8, groups=8)
        self.three = conv(8, 24, groups=8)

    def body(self, x):
        return self.three(self.one(x).relu())


class SqueezeExcite(Net):
    def __init__(self):
        super().__init__(8, 8)
        self.fc1, self.fc2 = nn.Conv2d(8, 3, 1), nn.Conv2d(3, 8, 1)

    def body(self, x):
        s = self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1))))
        return x * torch.sigmoid(s)


class SqueezeExciteLinear(Net):
    """The usual spelling with views and linear layers, and a gate of one channel for all positions."""

    def __init__(self):
        super().__init__(8, 8)
        self.fc = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8), nn.Sigmoid())
        self.gate = conv(8, 1)

    def body(self, x):
        b, c, _, _ = x.size()
        y = self.fc(x.mean((2, 3)).view(b, c)).view(b, c, 1, 1)
        return x * y.expand_as(x) * torch.sigmoid(self.gate(x))


class SpatialAttention(Net):
    """Mean and maximum over the channels: these mix them, so they stay."""

    def __init__(self):
        super().__init__(8, 6)
        self.free = conv(8, 6)
        self.attention = conv(2, 1)

    def body(self, x):
        x = self.free(x)
        pooled = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
        return x * torch.sigmoid(self.attention(pooled))


class Flattened(nn.Module):
    """A flatten with a spatial factor, in four spellings; the last one is a constant in the code."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(conv(3, w) for w in (4, 5, 6, 7))
        self.heads = nn.ModuleList(nn.Linear(w * 16, 5) for w in (4, 5, 6, 7))

    def forward(self, x):
        a, b, c, d = (F.avg_pool2d(layer(x), 2) for layer in self.convs)
        a = torch.flatten(a, 1)
        b = b.contiguous().view(b.size(0), -1)
        c = c.permute(0, 2, 3, 1).reshape(c.shape[0], -1)
        d = d.reshape(-1, 7 * 4 * 4)
        return sum(head(v) for head, v in zip(self.heads, (a, b, c, d), strict=True))


class Transposed(Net):
    """An encoder and decoder with a skip connection, a grouped and a depthwise transposed convolution."""

    def __init__(self):
        super().__init__(8, 12)
        self.down = nn.Conv2d(8, 10, 2, 2)
        self.up = nn.ConvTranspose2d(10, 6, 2, 2)
        self.mix = nn.ConvTranspose2d(14, 12, 1, groups=2)
        self.each = nn.ConvTranspose2d(12, 12, 3, padding=1, groups=12)

    def body(self, x):
        return self.each(self.mix(torch.cat([x, self.up(self.down(x).relu())], 1)))


class Twice(Net):
    """A block used twice, and a convolution that shares its weight with another."""

    def __init__(self):
        super().__init__(8, 8)
        self.block = nn.Sequential(conv(8, 8), nn.BatchNorm2d(8), nn.ReLU())
        self.one, self.two, self.back = conv(8, 6), conv(8, 6), conv(6, 8)
        self.two.weight = self.one.weight

    def body(self, x):
        x = self.block(self.block(x))
        return self.back(self.one(x) + self.two(x))


class Norms(Net):
    """Group norm prunes whole groups, instance norm anything; layer norm keeps what it normalises."""

    def __init__(self):
        super().__init__(12, 7)
        self.group = nn.GroupNorm(4, 12)
        self.a, self.instance = conv(12, 9), nn.InstanceNorm2d(9, affine=True, track_running_stats=True)
        self.b, self.plain = conv(9, 6), nn.BatchNorm2d(6, affine=False)
        self.c, self.layer = conv(6, 7), nn.LayerNorm(7)

    def body(self, x):
        x = self.instance(self.a(self.group(x)))
        x = self.c(self.plain(self.b(x)))
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Scaled(Net):
    """PReLU, a layer scale, a vector added to the channels, and a temperature that is one number."""

    def __init__(self):
        super().__init__(8, 8)
        self.prelu, self.one = nn.PReLU(8), nn.PReLU()
        self.block = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.scale = nn.Parameter(torch.randn(8, 1, 1))
        self.shift = nn.Parameter(torch.randn(1, 8, 1, 1))
        self.temperature = nn.Parameter(torch.ones(1))

    def body(self, x):
        x = self.one(self.prelu(x))
        y = self.block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return (x + self.scale * y + self.shift) / self.temperature


class Functional(nn.Module):
    """Parameters of its own, functional layers only."""

    def __init__(self):
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(6, 3, 3, 3) / 5), nn.Parameter(torch.randn(6))
        self.w2 = nn.Parameter(torch.randn(7, 6, 3, 3) / 7)
        self.gamma, self.beta = nn.Parameter(torch.rand(7) + 0.5), nn.Parameter(torch.randn(7))
        self.w3, self.b3 = nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.randn(5))
        self.probe = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        y = F.leaky_relu(F.conv2d(x, self.w1, self.b1, padding=1), 0.1)
        y = F.conv2d(y, self.w2, padding=1)
        y = F.batch_norm(y, None, None, self.gamma, self.beta, True)
        return F.linear(F.hardswish(y).mean([2, 3]), self.w3, self.b3) + self.probe(x).mean()


class Frozen(Net):
    """Layers that are frozen, and one that is never used."""

    def __init__(self):
        super().__init__(8, 6)
        self.frozen, self.unused = conv(8, 6), conv(9, 9)
        self.frozen.requires_grad_(False)

    def body(self, x):
        return self.frozen(x)


class SeveralInputs(nn.Module):
    """An image and a vector; a dictionary comes out."""

    def __init__(self):
        super().__init__()
        self.image, self.vector = conv(3, 6), nn.Linear(4, 6)
        self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 3)

    def forward(self, image, vector):
        x = torch.relu(self.image(image)).mean((2, 3)) + self.vector(vector)
        return {"classes": self.a(x), "boxes": self.b(x), "features": [self.vector(vector) * 2]}


class Padded(nn.Module):
    """The option-A shortcut in its usual form: constant padding in a lambda."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner = conv(3, 4), conv(4, 6)
        self.last = conv(6, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        y = self.last(torch.relu(self.inner(x))[:, :, ::2, ::2])
        return self.head((y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2), "constant", 0)).mean((2, 3)))


class PixelShuffled(Net):
    def __init__(self):
        super().__init__(8, 12)
        self.up, self.shuffle = conv(8, 12), nn.PixelShuffle(2)
        self.down, self.last = nn.PixelUnshuffle(2), conv(12, 12, 1)

    def body(self, x):
        return self.last(self.down(self.shuffle(self.up(x))))


class Stacked(Net):
    """Maxout over two convolutions stacked in a new dimension, a mean over the stack, a gated linear unit."""

    def __init__(self):
        super().__init__(8, 5)
        self.a, self.b, self.c = conv(8, 6), conv(8, 6), conv(6, 10)

    def body(self, x):
        both = torch.stack([self.a(x), self.b(x)], dim=1)
        return F.glu(self.c(both.amax(1) + both.mean(1)), dim=1)


class Mixed(Net):
    """Operations that are read off by position: what they mix stays, what they leave apart is free."""

    def __init__(self):
        super().__init__(8, 6)
        self.layers = nn.ModuleList([conv(8, 6), *(conv(6, 6) for _ in range(5))])

    def body(self, x):
        a = self.layers[0](x)
        b = torch.max(a, self.layers[1](a))  # free
        c = self.layers[2](b).flip(3, 2) * self.layers[3](b).std((2, 3), keepdim=True)  # free
        d = self.layers[4](c)
        d = d * d.var(False)  # of all entries: kept
        left, middle, right = torch.tensor_split(self.layers[5](d), (1, 3), 1)  # by constants: kept
        return torch.cat([left, middle, right], 1).flip([1])


class PreActivation(Net):
    """Blocks that end in a convolution, added in place, after stochastic depth."""

    def __init__(self):
        super().__init__(8, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 8))
            for _ in range(2)
        )
        self.drop = nn.Dropout(0.0)

    def body(self, x):
        for block in self.blocks:
            y = self.drop(block(x))
            y += x
            x = y
        return x


def images() -> torch.Tensor:
    return torch.randn(3, 3, 8, 8, dtype=torch.double)


TOPOLOGIES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple]]] = {
    kind.__name__: (kind, lambda: (images(),))
    for kind in (
        DenseBlock,
        Inception,
        Chunked,
        Split,
        Shuffled,
        ShuffleLayer,
        Grouped,
        Depthwise,
        SqueezeExcite,
        SqueezeExciteLinear,
        SpatialAttention,
        Flattened,
        Transposed,
        Twice,
        Norms,
        Scaled,
        Functional,
        Frozen,
        Padded,
        PixelShuffled,
        Stacked,
        Mixed,
        PreActivation,
    )
}
TOPOLOGIES["SeveralInputs"] = (SeveralInputs, lambda: (images(), torch.randn(3, 4, dtype=torch.double)))


OPERATIONS = (
    "conv",
    "depthwise",
    "grouped",
    "norm",
    "group_norm",
    "add",
    "cat",
    "chunk",
    "shuffle",
    "gate",
    "half",
    "crop",
)


class Random(nn.Module):
    """A random network: each step takes activations made before and makes one more; all are pooled in the end.

    `steps` are (operation, number that chooses an earlier activation, number that chooses a width).
    """

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.stem = conv(3, 4)
        self.layers = nn.ModuleList()
        self.plan: list[tuple[str, int, int]] = []  # (operation, first operand, second operand)
        widths = [4]
        for operation, choice, number in steps:
            a = choice % len(widths)
            equal = [i for i, w in enumerate(widths) if w == widths[a]]
            b = equal[number % len(equal)] if operation in ("add", "gate") else number % len(widths)
            layer, width = self._layer(operation, widths[a], widths[b], number)
            if layer is None:
                continue
            self.layers.append(layer)
            self.plan.append((operation, a, b))
            widths.append(width)
        self.head = nn.Linear(sum(widths), 5)

    def _layer(self, operation: str, a: int, b: int, number: int) -> tuple[nn.Module | None, int]:
        out = 2 + number % 5
        if operation == "conv":
            return conv(a, out), out
        if operation == "depthwise":
            return conv(a, a * (1 + number % 2), groups=a), a * (1 + number % 2)
        if operation == "grouped":
            return (conv(a, 2 * out, groups=2), 2 * out) if a % 2 == 0 and a > 2 else (None, 0)
        if operation == "norm":
            return nn.BatchNorm2d(a), a
        if operation == "group_norm":
            return nn.GroupNorm(a // 2, a) if a % 2 == 0 else nn.InstanceNorm2d(a, affine=True), a
        if operation == "gate":
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(a, out, 1), nn.ReLU(), conv(out, a, 1), nn.Sigmoid()), a
        if (operation in ("chunk", "shuffle", "half") and a % 2) or (operation == "crop" and a < 4):
            return None, 0
        widths = {"add": a, "cat": a + b, "chunk": a // 2, "half": a // 2, "shuffle": a, "crop": a - 2}
        return nn.ReLU(), widths[operation]

    def forward(self, x):
        found = [self.stem(x)]
        for (operation, i, j), layer in zip(self.plan, self.layers, strict=True):
            a, b = found[i], found[j]
            if operation == "add":
                y = layer(a + b)
            elif operation == "cat":
                y = layer(torch.cat([a, b], 1))
            elif operation == "chunk":
                left, right = a.chunk(2, 1)
                y = layer(left * torch.tanh(right))
            elif operation == "shuffle":
                n, c, h, w = a.shape
                y = layer(a.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))
            elif operation == "gate":
                y = a * layer(b)
            elif operation == "half":
                y = layer(a[:, a.shape[1] // 2 :])
            elif operation == "crop":
                y = layer(a[:, 1:-1])
            else:
                y = layer(a)
            found.append(y)
        return self.head(torch.cat([F.adaptive_avg_pool2d(y, 2).mean((2, 3)) for y in found], 1))
