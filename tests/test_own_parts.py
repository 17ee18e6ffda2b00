"""Parts of a run that are the user's own: each is one file and one YAML (docs/examples), or a `_target_` alone."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, Command
from test_errors import check_failure
from test_resume import assert_same, contents
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import morphtrain
from morphtrain import options, schema
from morphtrain.data import ImageData, Images
from morphtrain.errors import UserError
from morphtrain.evidence.records import read_records
from morphtrain.method import HOOKS, ORDER, Closure, Method
from morphtrain.model import ResNet
from morphtrain.precision import Precision
from morphtrain.state import Run
from morphtrain.tracker import Tracker
from morphtrain.trainer import begin_epoch, build_run, finish_epoch, start, train, train_epoch

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
OURS = ["data=shapes", "optimizer=signum", "prune=weakest", "model.width=8", "epochs=5", "tracking=none"]
DENSE = [override for override in SMALL if not override.startswith("prune")]


@pytest.fixture
def own(command: Command) -> Callable[..., Any]:
    """The command, with the examples on the path and their option files."""
    place = {"PYTHONPATH": f"{EXAMPLES.parents[1]}:{EXAMPLES}"}
    return lambda *overrides: command("--config-dir", str(EXAMPLES / "options"), *overrides, env=place)


def test_the_examples_train_morph_and_resume_to_the_same_bits(own: Callable[..., Any], tmp_path: Path) -> None:
    whole = own(*OURS, "hydra.run.dir=whole")
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("removed the weakest") == 2
    (tmp_path / "stopper.py").write_text(STOPPER)
    methods = ["methods=[{_target_: stopper.Stop, after: 3}]", "hydra.run.dir=parts"]
    assert own(*OURS, *methods).returncode == 130
    assert contents(tmp_path / "parts" / "last.pt")["facts"]["epoch"] == 3
    resumed = own(*OURS, *methods, "resume=auto")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("removed the weakest") == 1  # the second; the first is in the checkpoint
    ours, theirs = (contents(tmp_path / name / "last.pt") for name in ("parts", "whole"))
    assert ours["facts"]["history"][-1]["narrowest"] == theirs["facts"]["history"][-1]["narrowest"] < 8
    assert_same(ours["model"], theirs["model"])
    assert_same(ours["optimizer"], theirs["optimizer"])


STOPPER = """
from morphtrain.model import ResNet
from morphtrain.method import Method

class Stop(Method):
    def __init__(self, after):
        self.after = after

    def before_epoch(self, run):
        if run.epoch == self.after + 1 and len(run.history) == self.after and not run.config.resume == "auto":
            raise KeyboardInterrupt
"""


def test_an_example_is_loaded_again(own: Callable[..., Any], tmp_path: Path) -> None:
    assert own(*OURS, "hydra.run.dir=run", "epochs=2").returncode == 0
    network = morphtrain.load(tmp_path / "run" / "last.pt")
    assert network(torch.zeros(2, 1, 16, 16)).shape == (2, 3)


class Recorder(Method):
    """Notes every hook that is called."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def before_forward(self, run: Run, batch: Any) -> Any:
        self.called.append("before_forward")
        return batch

    def around_forward(self, run: Run) -> AbstractContextManager[None]:
        self.called.append("around_forward")
        return nullcontext()

    def step(self, run: Run, closure: Closure) -> None:
        self.called.append("step")

    def after_epoch(self, run: Run) -> dict[str, float]:
        self.called.append("after_epoch")
        run.shape_changed("nothing, really")
        return {"own": 1.0}

    def measure(self, run: Run) -> dict[str, float]:
        self.called.append("measure")
        return {"measured": float(run.history[-1]["epoch"] if run.history else 0)}


def _noting(name: str) -> Callable[..., None]:
    def hook(self: Recorder, run: Run) -> None:
        self.called.append(name)

    return hook


for _name in set(HOOKS) - set(vars(Recorder)):
    setattr(Recorder, _name, _noting(_name))


def test_the_hooks_are_called_as_the_contract_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(sys.modules[__name__], "made", lambda: recorder, raising=False)
    methods = "methods=[{_target_: test_own_parts.made}]"
    config = morphtrain.compose(*DENSE, "epochs=2", "tracking=none", "device=cpu", methods, "objective=[own,measured]")
    assert train(config, tmp_path, {}) == [1.0, 1.0]
    batch = ["before_forward", "around_forward", "after_backward", "step", "after_step"]
    epoch = ["before_epoch", *16 * batch, "after_epoch", "after_change", "measure"]
    assert recorder.called == ["after_build", "before_training", *epoch, *epoch, "after_training"]


def test_methods_are_called_in_the_declared_order() -> None:
    methods = "methods=[{_target_: test_own_parts.Recorder}, {_target_: test_own_parts.Recorder}]"
    run = build_run(morphtrain.compose(*SMALL, "grow=wider", "grow.at_epochs=[2]", methods, "optimizer=isgd"))
    assert list(run.methods) == ["prune", "grow", "methods.0", "methods.1", "optimizer", "batch_policy"]
    assert ORDER == ("prune", "grow", "gradient", "methods", "optimizer", "batch_policy")


def test_a_misspelt_hook_is_an_error_when_the_class_is_made() -> None:
    with pytest.raises(UserError, match=r"Late\.after_setp: the loop calls no such hook; did you mean after_step\?"):

        class Late(Method):
            def after_setp(self, run: Run) -> None:
                pass


class Twice(Method):
    """Takes a second step on every batch, with the gradients computed after the first."""

    def __init__(self) -> None:
        self.losses: list[tuple[float, float]] = []

    def step(self, run: Run, closure: Closure) -> bool:
        first = run.loss.item()
        run.optimizer.step()
        again = closure().item()
        run.optimizer.step()
        self.losses.append((first, again))
        return True


def test_a_method_takes_the_step_and_evaluates_the_batch_again() -> None:
    quiet = ["schedule=constant", "optimizer.momentum=0", "optimizer.nesterov=false", "optimizer.lr=0.01"]
    run = build_run(morphtrain.compose(*DENSE, *quiet, "methods=[{_target_: test_own_parts.Twice}]"))
    start(run)
    begin_epoch(run)
    train_epoch(run)
    losses = run.methods["methods.0"].losses  # type: ignore[attr-defined]
    assert len(losses) == 16
    assert sum(again < first for first, again in losses) >= 15  # of the same batch, one step later
    assert run.train_loss == pytest.approx(sum(first for first, _ in losses) / 16, rel=1e-4)


class Halves(Method):
    """Trains on the first half of every batch."""

    def before_forward(self, run: Run, batch: Any) -> Any:
        images, labels = batch
        return images[: len(images) // 2], labels[: len(labels) // 2]


class Frozen(Method):
    """Wraps the optimizer: nothing but the classifier learns."""

    def after_build(self, run: Run) -> None:
        run.optimizer = torch.optim.SGD(run.model.classifier.parameters(), lr=0.5)  # type: ignore[union-attr, operator]


class Empties(Method):
    """Leaves nothing of some batch."""

    def before_forward(self, run: Run, batch: Any) -> Any:
        images, labels = batch
        kept = labels < 0 if run.progress > 0.5 else labels >= 0
        return images[kept], labels[kept]


@pytest.mark.parametrize("more", [(), ("batch_policy.max_micro_batch=6",), ("data.infobatch=0.5",)])
def test_a_batch_of_which_nothing_is_left_is_refused_in_a_line(more: tuple[str, ...]) -> None:
    run = build_run(morphtrain.compose(*DENSE, "methods=[{_target_: test_own_parts.Empties}]", *more))
    start(run)
    begin_epoch(run)
    with pytest.raises(
        UserError, match=r"^methods: before_forward leaves none of a batch's images; one or more are needed$"
    ):
        train_epoch(run)


def test_batch_and_optimizer_can_be_replaced() -> None:
    methods = "methods=[{_target_: test_own_parts.Halves}, {_target_: test_own_parts.Frozen}]"
    run = build_run(morphtrain.compose(*DENSE, methods, "schedule=constant"))
    before = {name: tensor.clone() for name, tensor in run.model.named_parameters()}
    start(run)
    begin_epoch(run)
    train_epoch(run)
    finish_epoch(run)
    assert run.optimizer.param_groups[0]["lr"] == 0.5
    moved = {name for name, tensor in run.model.named_parameters() if not torch.equal(before[name], tensor)}
    assert moved == {"classifier.weight", "classifier.bias"}


class WeightNormed(Method):
    """Splits the classifier's weights into length and direction (Salimans and Kingma 2016)."""

    def after_build(self, run: Run) -> None:
        weight_norm(run.model.classifier)  # type: ignore[arg-type]
        run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.05, momentum=0.9)


def test_a_wrapped_network_is_resumed_to_the_same_bits(tmp_path: Path) -> None:
    methods = "methods=[{_target_: test_own_parts.WeightNormed}]"
    config = morphtrain.compose(*DENSE, "tracking=none", "device=cpu", methods, "epochs=4")
    once, twice = tmp_path / "once", tmp_path / "twice"
    for place in (once, twice):
        place.mkdir()
    train(config, once, {})
    with pytest.raises(KeyboardInterrupt):
        train(config, twice, {}, on_epoch=interrupt_after_two)
    train(dataclasses.replace(config, resume="auto"), twice, {})
    assert_same(contents(twice / "last.pt"), contents(once / "last.pt"))
    assert "classifier.parametrizations.weight.original0" in contents(once / "last.pt")["model"]


def interrupt_after_two(record: Mapping[str, float]) -> bool:
    if record["epoch"] == 2:
        raise KeyboardInterrupt
    return False


class Memory(Tracker):
    """Keeps all in a list."""

    kept: list[Any] = []  # noqa: RUF012 (shared on purpose: the run makes the instance)

    def start(self, params: Any, tags: Any, run_dir: Path, resumed: bool, history: Any = ()) -> None:
        self.kept.append(("start", params["epochs"], tags["seed"], "torch" in tags))

    def update(self, history: Any) -> None:
        self.kept.append(("update", len(history)))

    def artifact(self, path: Path, folder: str | None = None) -> None:
        assert path.exists()

    def finish(self, status: str, history: Any) -> None:
        self.kept.append((status, len(history)))


def half(epochs: int) -> Callable[[float], float]:
    return lambda done: 0.5 if done >= epochs / 2 else 1.0


class Policy(Method):
    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def before_training(self, run: Run) -> None:
        run.set_batch(self.batch_size)


def no_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None


def test_any_group_takes_a_part_of_ones_own(tmp_path: Path) -> None:
    Memory.kept.clear()
    parts = ["tracking=custom", "tracking._target_=test_own_parts.Memory"]
    parts += ["schedule=custom", "schedule._target_=test_own_parts.half"]
    parts += ["loss=custom", "loss._target_=torch.nn.CrossEntropyLoss", "+loss.label_smoothing=0.1"]
    parts += ["optimizer=custom", "optimizer._target_=torch.optim.RMSprop", "+optimizer.lr=0.004"]
    parts += ["norm=custom", "norm._target_=test_own_parts.no_norms"]
    parts += ["batch_policy=custom", "batch_policy._target_=test_own_parts.Policy", "batch_policy.batch_size=32"]
    config = morphtrain.compose(*(o for o in DENSE if not o.startswith("batch_policy")), *parts, "epochs=2")
    train(config, tmp_path, {})
    assert Memory.kept == [("start", 2, "1", True), ("update", 1), ("update", 2), ("FINISHED", 2)]
    history = read_records(tmp_path)
    assert [record["learning_rate"] for record in history] == [0.004, 0.002]
    assert [record["batch_size"] for record in history] == [32, 32]
    with pytest.raises(UserError, match=r"its norm is test_own_parts\.no_norms; a file does not decide what is called"):
        morphtrain.load(tmp_path / "last.pt")

    def make(**keywords: Any) -> nn.Module:
        model = ResNet(**keywords)
        no_norms(model)
        return model

    assert isinstance(morphtrain.load(tmp_path / "last.pt", make), ResNet)


class Unfit:
    """No part of anything."""


class Kind(nn.CrossEntropyLoss):
    """A loss without keywords."""

    def __init__(self) -> None:
        super().__init__()


UNFIT = "{}._target_=test_own_parts.Unfit"


REFUSED = {
    "data": (
        ["data=custom", UNFIT.format("data")],
        "makes a Unfit, not a .*Data; it lacks num_classes, train",
    ),
    "prune": (["prune=custom", UNFIT.format("prune")], "prune._target_=.* not a morphtrain.method.Method"),
    "grow": (["grow=custom", UNFIT.format("grow")], "grow._target_=.* not a morphtrain.method.Method"),
    "gradient": (["gradient=custom", UNFIT.format("gradient")], "gradient._target_=.* not a morphtrain.method.Method"),
    "method": (["methods=[{_target_: test_own_parts.Unfit}]"], r"methods\[0\]._target_=.* not a .*Method"),
    "optimizer": (["optimizer=custom", UNFIT.format("optimizer")], "not a .*Optimizer"),
    "loss": (["loss=custom", UNFIT.format("loss")], "makes a Unfit, not a function"),
    "keyword": (
        ["loss=custom", "loss._target_=test_own_parts.Kind", "+loss.a=1"],
        "called with .a=1.: .*; it is called to return the loss",
    ),
    "nowhere": (["grow=custom", "grow._target_=test_own_parts.Growth"], "grow._target_=.*has no Growth; did you mean"),
    "no list": (["methods=5"], "methods=5: must be a list"),
    "no target": (["methods=[{key: 1}]"], r"methods\[0\]=.*: must have a _target_"),
    "no path": (["methods=[{_target_: Stop}]"], r"methods\[0\]._target_=Stop: must be a class or function"),
    "no batch": (
        ["batch_policy=custom", "batch_policy._target_=a.B", "batch_policy.batch_size=null"],
        "batch_policy.batch_size=null: must be 1 or more",
    ),
    "timing": (["+timing._target_=a.B"], "timing.name=custom: must be one of default"),
}


class GrowthOfMine(Method):
    pass


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_a_line(case: str) -> None:
    overrides, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as refused:
        build_run(morphtrain.compose(*overrides))
    assert "\n" not in str(refused.value)


Pair = collections.namedtuple("Pair", "a b")
KEPT = {
    "set": {1, 2},
    "float64": np.float64(1),
    "Identity": nn.Identity(),
    "deque": collections.deque([1]),
    "defaultdict": collections.defaultdict(int),
    "Pair": Pair(1, 2),
    "int64": {np.int64(3): 1.0},
}


class Hoarder(Method):
    def __init__(self, kind: str) -> None:
        self.kind = kind

    def state_dict(self) -> dict[str, Any]:
        return {"seen": [KEPT[self.kind]]}


class NumpyPrecision(Precision):
    def __init__(self, device: torch.device) -> None:
        super().__init__(device)

    def state_dict(self) -> dict[str, Any]:
        return {"scale": np.float64(2)}


def numpy_optimizer(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": params, "decay": np.float64(0.9)}], lr=0.1)


HOARDER = "methods=[{{_target_: test_own_parts.Hoarder, kind: {}}}]"
HOARDS = {f"method, {kind}": ([HOARDER.format(kind)], kind) for kind in KEPT}
HOARDS["precision"] = (["precision=custom", "precision._target_=test_own_parts.NumpyPrecision"], "float64")
HOARDS["optimizer"] = (["optimizer=custom", "optimizer._target_=test_own_parts.numpy_optimizer"], "float64")


@pytest.mark.parametrize("case", HOARDS)
def test_state_that_no_checkpoint_can_give_back_is_refused_before_it_is_written(case: str, tmp_path: Path) -> None:
    overrides, kind = HOARDS[case]
    config = morphtrain.compose(*DENSE, "tracking=none", *overrides)
    with pytest.raises(UserError, match=rf"^{case.split(',')[0]}.*: its state_dict\(\) holds a {kind}"):
        train(config, tmp_path, {})
    assert not (tmp_path / "last.pt").exists()


def test_a_metric_that_nothing_records_is_named_after_the_first_epoch(tmp_path: Path) -> None:
    methods = "methods=[{_target_: test_own_parts.Halves}]"
    config = morphtrain.compose(*DENSE, "tracking=none", methods, "objective=[accuracy]")
    with pytest.raises(UserError, match="objective=accuracy: must be one of epoch, timestamp"):
        train(config, tmp_path, {})


def test_a_mistake_in_a_file_of_ones_own_is_one_line(command: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from morphtrain.method import Method\n\nclass Mine(Method):\n    def after_setp(self, run):\n        pass\n"
    )
    result = command(*DENSE, "tracking=none", "methods=[{_target_: mine.Mine}]")
    check_failure(result, ["mine.Mine.after_setp", "did you mean after_step?"])


def test_every_group_but_timing_has_a_custom_option() -> None:
    assert all(("custom" in options) == (group != "timing") for group, options in schema.OPTIONS.items())


# -- what parts of one's own do wrong --------------------------------------------------------------------------------


def own_data(labels: int = 4, pixels: str = "float32", kind: str = "int64", val: int = 8) -> ImageData:
    images = torch.zeros(16, 1, 8, 8, dtype=getattr(torch, pixels))
    numbers = torch.full((16,), labels - 1, dtype=getattr(torch, kind))
    return ImageData(Images(images, numbers), Images(images[:val], numbers[:val]), num_classes=4)


def summed(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return float(logits.sum())


def own_loss(kind: str) -> Any:
    return {"each": nn.CrossEntropyLoss(reduction="none"), "number": summed, "wide": nn.MSELoss()}[kind]


def own_schedule(value: Any) -> Callable[[float], Any]:
    return lambda done: value


def new_model(model: nn.Module) -> nn.Module:
    return nn.Sequential(model)


class Quiet(Method):
    """A policy that says nothing."""

    def __init__(self, batch_size: int) -> None:
        pass


class Metrics(Method):
    def __init__(self, kind: str) -> None:
        self.kind = kind

    def measure(self, run: Run) -> Any:
        return {
            "tensor": {"own": torch.tensor(2.5)},
            "numpy": {"own": np.float32(2.5)},
            "text": {"own": "2.5"},
            "taken": {"val_accuracy": 2.5},
            "name": {"own (%)": 2.5},
        }[self.kind]


class Replacing(Method):
    def after_build(self, run: Run) -> None:
        run.model = nn.Sequential(run.model)


class Adding(Method):
    def before_training(self, run: Run) -> None:
        run.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


class Short(ImageData):
    def to(self, device: torch.device, memory_format: torch.memory_format = torch.contiguous_format) -> Short:
        return self

    def train_batches(self, batch_size: int, generator: torch.Generator) -> Any:
        return itertools.islice(super().train_batches(batch_size, generator), 1)


def short_data() -> Short:
    whole = own_data()
    return Short(whole.train, whole.val, whole.num_classes)


class Silent(Method):
    """Cuts a space and says nothing."""

    follows_channels = True

    def after_epoch(self, run: Run) -> None:
        run.graph.reindex(run.graph.spaces[0], range(4), run.optimizer)


class NoAnswer(Precision):
    def __init__(self, device: torch.device) -> None:
        super().__init__(device)

    def step(self, optimizer: torch.optim.Optimizer) -> None:  # type: ignore[override]
        optimizer.step()


def part(group: str, name: str, *keys: str) -> list[str]:
    target = name if "." in name else f"test_own_parts.{name}"
    return [f"{group}=custom", f"{group}._target_={target}", *(f"+{group}.{key}" for key in keys)]


WRONG = {
    "labels": (part("data", "own_data", "labels=6"), "train_batches gives labels 5 to 5; num_classes=4 needs less"),
    "bytes": (
        part("data", "own_data", "pixels=uint8"),
        r"images \(2, 1, 8, 8\) of uint8; a tensor .* of float32",
    ),
    "float labels": (part("data", "own_data", "kind=float32"), r"gives labels \(2,\) of float32; a tensor .* of int64"),
    "no held out": (part("data", "own_data", "val=0"), "has 16 images for training and 0 held out; 1 or more"),
    "loss of each": (part("loss", "own_loss", "kind=each"), r"returns shape \(2,\); the mean loss of the batch"),
    "loss number": (part("loss", "own_loss", "kind=number"), "returns float; the mean loss of the batch"),
    "loss itself": (
        part("loss", "torch.nn.functional.cross_entropy"),
        "makes a Tensor, not a function",
    ),
    "schedule": (part("schedule", "own_schedule", "value=null"), "gives None after 0 epochs; a factor of 0 or more"),
    "negative": (part("schedule", "own_schedule", "value=-1"), "gives -1 after 0 epochs; a factor of 0 or more"),
    "closure": (part("optimizer", "torch.optim.LBFGS"), "its step needs a closure"),
    "replaced": (["methods=[{_target_: test_own_parts.Replacing}]"], "replaced run.model in after_build"),
    "added group": (["methods=[{_target_: test_own_parts.Adding}]"], "parameter group in before_training; after_build"),
    "short data": (
        [*part("data", "short_data"), "batch_policy.batch_size=4"],
        "gave 4 images, .*; train has 16",
    ),
    "float16": (
        ["precision=o1", "precision.dtype=float16", "methods=[{_target_: test_own_parts.Twice}]"],
        r"the loss scale of float16 does not allow; run.precision.step\(run.optimizer\), or precision=bf16, works",
    ),
    "trained loss": (part("loss", "torch.nn.PReLU"), "has parameters, which no optimizer trains"),
    "name": (["methods=[{_target_: test_own_parts.Metrics, kind: name}]"], "'own \\(%\\)' needs a name of letters"),
    "new model": (part("norm", "new_model"), "returns a Sequential; it has to change the model in place"),
    "policy": (
        ["batch_policy=custom", "batch_policy._target_=test_own_parts.Quiet"],
        "batch_policy=test_own_parts.Quiet: no batch size is set",
    ),
    "text": (["methods=[{_target_: test_own_parts.Metrics, kind: text}]"], "methods.0: its metric own is a str"),
    "taken": (["methods=[{_target_: test_own_parts.Metrics, kind: taken}]"], "val_accuracy, which is recorded already"),
    "silent": (["methods=[{_target_: test_own_parts.Silent}]"], "changed the network without saying so"),
    "step": (part("precision", "NoAnswer"), "precision=test_own_parts.NoAnswer: its step returns nothing"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_part_that_does_what_its_contract_does_not_allow_is_named(case: str, tmp_path: Path) -> None:
    overrides, message = WRONG[case]
    small = [o for o in DENSE if not ("data=custom" in overrides and "data" in o)]
    config = morphtrain.compose(*small, "epochs=2", "tracking=none", "device=cpu", *overrides)
    with pytest.raises(UserError, match=message) as refused:
        train(config, tmp_path, {})
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize("kind", ["tensor", "numpy"])
def test_a_metric_may_be_any_number(kind: str, tmp_path: Path) -> None:
    methods = f"methods=[{{_target_: test_own_parts.Metrics, kind: {kind}}}]"
    config = morphtrain.compose(*DENSE, "epochs=1", "tracking=none", methods, "objective=[own]")
    assert train(config, tmp_path, {}) == [2.5]
    assert read_records(tmp_path)[0]["own"] == 2.5


def test_option_files_are_composed_by_hand_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    config = morphtrain.compose("data=shapes", "prune=weakest", config_dir=EXAMPLES / "options")
    assert config.prune == schema.Custom("weakest.Weakest", {"share": 0.25, "interval": 2, "times": 2})
    assert build_run(config).data.num_classes == 3


def two_rates(model: nn.Module, turned: bool) -> torch.optim.Optimizer:
    fast = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    slow = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    groups = [{"params": fast, "lr": 0.1}, {"params": slow, "lr": 0.01}]
    return torch.optim.SGD(groups[::-1] if turned else groups, momentum=0.0)


def test_the_penalty_of_a_layer_goes_with_its_own_learning_rate() -> None:
    """Whatever the order of an optimizer's groups is."""
    norms = []
    for turned in ("false", "true"):
        optimizer = ["optimizer=custom", "optimizer._target_=test_own_parts.two_rates", f"+optimizer.turned={turned}"]
        run = build_run(morphtrain.compose(*DENSE, *optimizer, "prune=prunetrain", "prune.lasso_ratio=0.95"))
        start(run)
        begin_epoch(run)
        train_epoch(run)
        norms.append([parameter.norm().item() for parameter in run.model.parameters() if parameter.dim() > 1])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_an_option_file_that_hydra_would_pass_over_is_named(command: Command, tmp_path: Path) -> None:
    (tmp_path / "options" / "prune").mkdir(parents=True)
    (tmp_path / "options" / "prune" / "prunetrain.yaml").write_text("_target_: mine.Own")
    result = command("--config-dir", "options", *DENSE, "tracking=none", "prune=prunetrain")
    check_failure(result, ["options/prune/prunetrain.yaml: MorphTrain has an option of that name"])


def test_a_further_method_can_be_one_of_morphtrains_own(tmp_path: Path) -> None:
    """Wider after one epoch, deeper after another: two methods of one group, which has one option."""
    listed = "methods=[{_target_: morphtrain.options.method, option: grow/deeper, at_epochs: [2]}]"
    keys = ["grow=wider", "grow.at_epochs=[1]", "epochs=3", "tracking=none", listed]
    config = morphtrain.compose(*DENSE, *keys)
    train(config, tmp_path, {})
    records = read_records(tmp_path)
    assert [record["changed"] for record in records] == [1, 1, 0]
    network = morphtrain.load(tmp_path / "last.pt")
    grown = [int(record["params"]) for record in records]
    assert grown[0] < grown[1] == grown[2] == sum(p.numel() for p in network.parameters())
    assert network.stem[0].out_channels == 16


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"option": "norm/ghost"}, "option=norm: must be one of prune, grow, gradient, batch_policy"),
        ({"option": "grow/taller"}, "option=taller: must be one of"),
        ({"option": "grow/deeper", "typo": 1}, "methods, option grow/deeper.typo=1: no such key"),
    ],
)
def test_a_further_method_that_does_not_exist_is_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as raised:
        options.method(**keys)
    assert said in str(raised.value)
