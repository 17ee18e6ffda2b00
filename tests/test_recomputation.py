"""Networks that compute layers again in their backward pass train as those that keep what they have computed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_resume import assert_same
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint
from whole_runs import trained_to_the_end

import morphtrain
from morphtrain.cost.step import training_step
from morphtrain.errors import UserError
from morphtrain.gradient import ApproximateGradients, SparseGradients
from morphtrain.layer_calls import LayerCalls, seen_again
from morphtrain.precision.casting import Cast, Casting
from morphtrain.precision.dfp16 import DynamicFixedPoint
from morphtrain.precision.fixed_point import QuantisedLayers
from morphtrain.state import Run
from morphtrain.trainer import begin_epoch, build_run, start
from morphtrain.trainer.underflow import underflow_share

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # where a run looks at outputs

HOWS = ("reentrant", "not reentrant")


class Net(nn.Module):
    """Residual blocks, of which nothing is kept for the backward pass but what enters them; `how` "kept" keeps it."""

    def __init__(self, num_classes: int = 4, in_channels: int = 3, how: str = "kept", dropout: float = 0.2) -> None:
        super().__init__()
        self.how = how
        self.stem = nn.Conv2d(in_channels, 6, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(6, 8, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(8, 8, 1),
                nn.Dropout(dropout),
                nn.Conv2d(8, 6, 3, 1, 1),
            )
            for _ in range(3)
        )
        self.head = nn.Linear(6, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            again = self.training and self.how != "kept"
            x = x + (checkpoint(block, x, use_reentrant=self.how == "reentrant") if again else block(x)).relu()
        return self.head(x.mean((2, 3)))


DATA = (
    *("data=synthetic", "data.train_samples=64", "data.val_samples=16", "data.image_size=8", "data.num_classes=4"),
    *("batch_policy.batch_size=16", "batch_policy.max_micro_batch=9", "tracking=none", "device=cpu", "epochs=2"),
    *("model=custom", "model._target_=test_recomputation.Net", "prune=none"),
)
OPTIONS = {
    "o2": ("precision=o2",),
    "o2 float16": ("precision=o2", "precision.dtype=float16", "precision.init_scale=1024"),
    "bf16_pure": ("precision=bf16_pure",),
    "dfp16": ("precision=dfp16",),
    "stochastic": ("precision=dfp16", "precision.rounding=stochastic"),
    "zero": ("gradient=approximate",),
    "top1": ("gradient=approximate", "gradient.kind=top1", "gradient.every=3"),
    "random": ("gradient=approximate", "gradient.kind=random", "gradient.every=1"),
    "sparse": ("gradient=sparse_activation",),
    "all": (
        *("precision=o2", "gradient=approximate", "gradient.kind=top1"),
        "methods=[{_target_: morphtrain.options.method, option: gradient/sparse_activation}]",
    ),
}


@pytest.fixture(scope="module")
def kept() -> Callable[[str], Run]:
    """The run of a network that keeps what it has computed, once for each of the options."""
    runs: dict[str, Run] = {}

    def run(options: str) -> Run:
        if options not in runs:
            runs[options] = trained_to_the_end(morphtrain.compose(*DATA, *OPTIONS[options]))
        return runs[options]

    return run


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_run_ends_in_the_same_bits(options: str, how: str, kept: Callable[[str], Run]) -> None:
    if (options, how) == ("stochastic", "reentrant"):
        pytest.skip("its first pass is one without gradients, which rounds to the nearest")
    run = trained_to_the_end(morphtrain.compose(*DATA, *OPTIONS[options], f"+model.how={how}"))
    assert run.progress > 1, "it has taken steps"
    assert_same(run.model.state_dict(), kept(options).model.state_dict())
    for metric in ("approximated_share", "gradient_zeros", "gradient_macs_saved"):
        found, wanted = ([record.get(metric) for record in one.history] for one in (run, kept(options)))
        assert found == wanted
        assert found[-1] is None or found[-1] > 0


def gradients(model: nn.Module, context: LayerCalls, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Those of a fixed batch, by the functional form of a method or format."""
    model.zero_grad()
    torch.manual_seed(1)
    images = torch.randn(5, 3, 8, 8, device=device)
    with context:
        loss = F.cross_entropy(model(images).float(), torch.arange(5, device=device) % 4)
    with seen_again(context):
        loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


CONTEXTS: dict[str, Callable[[], LayerCalls]] = {
    "cast": lambda: Cast(torch.bfloat16),
    "quantised": lambda: QuantisedLayers(8),
    "zero": lambda: ApproximateGradients("zero"),
    "top1": lambda: ApproximateGradients("top1", every=3),
    "sparse": lambda: SparseGradients(0.9, torch.Generator().manual_seed(5)),
}


def with_computed_weights() -> Net:
    torch.manual_seed(0)
    model = Net()
    for block in model.blocks:
        for layer in (block[0], block[4]):  # type: ignore[index]
            weight_norm(layer)
    return model


@pytest.mark.parametrize("name", CONTEXTS)
def test_weights_that_are_computed_again_are_known_again(name: str) -> None:
    model = with_computed_weights()
    expected = gradients(model, CONTEXTS[name]())
    model.how = "not reentrant"
    context = CONTEXTS[name]()
    found = gradients(model, context)
    assert_same(found, expected)
    if isinstance(context, ApproximateGradients):
        assert context.chosen == 7 // context.every


def test_of_weights_that_a_pass_without_gradients_has_computed_as_many_are_chosen() -> None:
    model = with_computed_weights()
    model.how = "reentrant"
    context = ApproximateGradients("zero")
    found = gradients(model, context)
    lengths = [grad for name, grad in found.items() if name.endswith("weight.original0")]
    assert sum(not grad.any() for grad in lengths) == 3 == len(lengths) // 2


class Nested(Net):
    """Two blocks are computed again as one, and each of them once more within that."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = checkpoint(self.two, x, use_reentrant=self.how == "reentrant") if self.how != "kept" else self.two(x)
        return self.head((x + self.blocks[2](x).relu()).mean((2, 3)))

    def two(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks[:2]:
            again = self.how != "kept"
            x = x + (checkpoint(block, x, use_reentrant=self.how == "reentrant") if again else block(x)).relu()
        return x


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", CONTEXTS)
def test_what_is_computed_again_may_compute_something_again(name: str, how: str) -> None:
    torch.manual_seed(0)
    model = Nested(dropout=0.0)
    expected = gradients(model, CONTEXTS[name]())
    model.how = how
    assert_same(gradients(model, CONTEXTS[name]()), expected)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("inner", [lambda: Cast(torch.bfloat16), lambda: QuantisedLayers(8)])
def test_what_a_format_makes_of_a_weight_is_known_by_it(inner: Callable[[], LayerCalls], how: str) -> None:
    """Also in a pass without gradients, and in whatever order the backward pass calls layers again."""

    def found() -> tuple[int, dict[str, torch.Tensor]]:
        model.zero_grad()
        context, format_ = ApproximateGradients("zero", every=3), inner()
        with context, format_:
            loss = model(images).float().square().mean()
        with seen_again(context, format_):
            loss.backward()
        return context.chosen, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    torch.manual_seed(0)
    model, images = Net(dropout=0.0), torch.randn(5, 3, 8, 8)
    chosen, expected = found()
    model.how = how
    assert found()[0] == chosen == 2
    assert_same(found()[1], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", ["cast", "quantised", "zero", "top1"])
def test_so_it_is_where_another_thread_runs_the_backward_pass(name: str, how: str) -> None:
    torch.manual_seed(0)
    model = Net(dropout=0.0).cuda()
    expected = gradients(model, CONTEXTS[name](), "cuda")
    model.how = how
    for parameter, grad in gradients(model, CONTEXTS[name](), "cuda").items():
        torch.testing.assert_close(grad, expected[parameter], rtol=1e-3, atol=1e-5)


class Recurrent(Net):
    """Uses the layers of one block several times."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = x + checkpoint(self.blocks[0], x, use_reentrant=False)
        return self.head(x.mean((2, 3)))


def test_where_one_call_is_like_another_it_says_so() -> None:
    """Of the seven calls the block's first layer has the second, the fourth and the sixth."""
    torch.manual_seed(0)
    model = Recurrent()
    with pytest.raises(UserError, match=r"^gradient\.every=3: .* a weight several times.*; gradient\.every=1 works$"):
        gradients(model, ApproximateGradients("zero", every=3))
    found = gradients(model, ApproximateGradients("zero", every=1))
    assert not found["blocks.0.0.weight"].any() and not found["stem.weight"].any()


@pytest.mark.parametrize(
    "precision", [Casting(torch.device("cpu"), torch.bfloat16), DynamicFixedPoint(torch.device("cpu"))]
)
def test_so_do_copies_whose_steps_are_timed(precision: Any) -> None:
    torch.manual_seed(0)
    first = Net(dropout=0.0)
    images, labels = torch.randn(5, 3, 8, 8), torch.arange(5) % 4
    ends = []
    for how in ("kept", *HOWS):
        model = copy.deepcopy(first)
        model.how = how
        training_step(model.train(), torch.optim.SGD(model.parameters(), lr=0.1), images, labels, precision)
        ends.append(model.state_dict())
    assert_same(ends[0], ends[1])
    assert_same(ends[0], ends[2])


def test_so_does_the_copy_that_shows_what_is_lost() -> None:
    shares = []
    for how in ("kept", *HOWS):
        torch.manual_seed(0)
        run = build_run(morphtrain.compose(*DATA, *OPTIONS["o2 float16"], f"+model.how={how}"))
        start(run)
        begin_epoch(run)
        shares.append(underflow_share(run))
    assert shares[0] == shares[1] == shares[2]
