"""Networks that live outside MorphTrain: made, trained, resumed and loaded; and nothing runs because a file says so."""

from __future__ import annotations

import dataclasses
import importlib
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Command, Kill
from test_config import composed
from test_resume import assert_same, contents
from torch import nn

import morphtrain
from morphtrain import options, schema
from morphtrain.errors import UserError
from morphtrain.evidence.records import read_records
from morphtrain.outputs import check_outputs
from morphtrain.state import Run
from morphtrain.trainer import checkpoint, checkpoint_file
from morphtrain.trainer.build import build_run
from morphtrain.trainer.differences import flat

PACKAGE = '''
import torch
from torch import nn
from torch.nn import Linear

calls = []


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width),
        )

    def forward(self, x):
        return torch.relu(self.branch(x) + x)


class Net(nn.Module):
    """Empties the lists it is given, and draws a number that is in no tensor of its state."""

    def __init__(self, num_classes, in_channels, width=8, stages=(), act=None):
        super().__init__()
        assert type(stages) in (list, tuple) and type(act) in (dict, type(None))
        calls.append((num_classes, in_channels, width, list(stages), act))
        self.layers = nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        while stages:
            self.layers.append(Block(width * stages.pop(0)["multiple"]))
        self.temperature = 1 + torch.rand(()).item()
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.classifier(self.layers(x).mean((2, 3))) / self.temperature


class Other(Net):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.more = nn.Linear(3, 3)


class Pair(Net):
    def forward(self, x):
        logits = super().forward(x)
        return (logits, logits) if self.training else logits


def small(**kwargs):
    return Net(width=4, **kwargs)


def text(num_classes):
    return "a network"


made = Net(2, 3)  # draws while the module is imported
'''

NET = ["model=custom", "model._target_=own_net.Net", "+model.width=8", "+model.stages=[{multiple:1},{multiple:1}]"]
RUN = [override for override in SMALL if not override.startswith(("model.", "epochs"))] + ["epochs=3", "tracking=none"]


def own_model(config: schema.Custom, num_classes: int, in_channels: int) -> nn.Module:
    model: nn.Module = options.build("model", config, num_classes=num_classes, in_channels=in_channels)
    return model


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """`own_net` in a directory on the path of modules, imported by nobody; whatever a test imports is forgotten."""
    (tmp_path / "own_net.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("own_"):
            del sys.modules[name]


def built(*overrides: str) -> Run:
    small_data = ["data=synthetic", "data.image_size=16", "data.in_channels=1", "data.train_samples=8"]
    return build_run(schema.parse(composed(*small_data, "tracking=none", "device=cpu", *overrides)))


# -- through the real command --------------------------------------------------------------------------------------


def test_a_network_of_ones_own_is_pruned_killed_and_resumed(command: Command, kill: Kill, tmp_path: Path) -> None:
    (tmp_path / "own_net.py").write_text(PACKAGE)
    once = command(*RUN, *NET, "hydra.run.dir=once")
    assert once.returncode == 0, once.stderr
    assert "last / first" in once.stdout
    history = read_records(tmp_path / "once")
    assert history[0]["params"] > history[-1]["params"]
    here = [*RUN, *NET, "hydra.run.dir=twice", "resume=auto"]
    kill("rename:6", *here, env={"PYTHONPATH": str(tmp_path)})
    resumed = command(*here)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on after epoch 2" in resumed.stdout
    assert_same(contents(tmp_path / "twice" / "last.pt"), contents(tmp_path / "once" / "last.pt"))


def test_an_option_file_of_ones_own_works_like_any_other(command: Command, tmp_path: Path) -> None:
    (tmp_path / "own_net.py").write_text(PACKAGE)
    option = tmp_path / "options" / "model" / "mine.yaml"
    option.parent.mkdir(parents=True)
    option.write_text("_target_: own_net.Net\nwidth: 4\nstages: [{multiple: 1}]\nact: {name: relu}\n")
    baseline = [o for o in RUN if not o.startswith("prune")]
    result = command(
        "--config-dir", "options", *baseline, "model=mine", "model.width=6", "epochs=1", "hydra.run.dir=run"
    )
    assert result.returncode == 0, result.stderr
    stored = contents(tmp_path / "run" / "last.pt")
    assert stored["model"]["classifier.weight"].shape[1] == 6
    assert stored["facts"]["config"]["model"] == {
        "_target_": "own_net.Net",
        "arguments": {"width": 6, "stages": [{"multiple": 1}], "act": {"name": "relu"}},
        "weights": None,
    }
    loading = "import morphtrain, own_net; print(morphtrain.load('run/last.pt').classifier.in_features)"
    loaded = subprocess.run([sys.executable, "-c", loading], cwd=tmp_path, capture_output=True, text=True)
    assert loaded.stdout == "6\n", loaded.stderr


SILENT = """
from torch import nn

class Constructor(nn.Module):
    def __init__(self):
        raise ValueError()

class Forward(nn.Linear):
    def __init__(self):
        super().__init__(1, 1)

    def forward(self, x):
        raise ValueError()

class Disk(Forward):
    def forward(self, x):
        raise OSError()
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Constructor", "model._target_=own_net.Constructor: called with (): ValueError"),
        ("Forward", "model=own_net.Forward: cannot take images of (3, 8, 8) in training mode: ValueError"),
        ("Disk", "model=own_net.Disk: cannot take images of (3, 8, 8) in training mode: OSError"),
    ],
)
def test_an_exception_without_text_is_named_by_its_class(
    name: str, said: str, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "own_net.py").write_text(SILENT)
    result = command(*RUN, "model=custom", f"model._target_=own_net.{name}")
    assert result.returncode == 1
    assert result.stderr.splitlines() == [said]
    assert "Traceback" not in result.stdout


NARROW = {
    "resnet": "defaults: [resnet50, _self_]\nstem: cifar\nwidth: 4\nblocks: 1\n",
    "vgg": "defaults: [vgg11, _self_]\nwidth: 4\n",
    "alexnet": "defaults: [alexnet, _self_]\nbatch_norm: true\n",
    "v1": "defaults: [mobilenet_v1, _self_]\nwidth_multiplier: 0.25\n",
    "v2": "defaults: [mobilenet_v2, _self_]\nwidth_multiplier: 0.25\n",
    "torchvision": "defaults: [torchvision, _self_]\nname: mobilenet_v2\noptions: {width_mult: 0.25}\n",
}


def test_every_model_is_pruned_in_a_sweep_and_loaded(command: Command, tmp_path: Path) -> None:
    options = tmp_path / "options" / "model"
    options.mkdir(parents=True)
    for name, text in NARROW.items():
        (options / f"narrow_{name}.yaml").write_text(text)
    choices = ",".join(f"narrow_{name}" for name in NARROW)
    # A few steps leave every weight below such a threshold: blocks go, and all layers shrink to the least width.
    prune = ["prune.threshold=2", "prune.start_epoch=1", "prune.min_channels=2"]
    sweep = ["-m", "--config-dir", "options", f"model={choices}", "hydra.sweep.dir=sweep"]
    result = command(*sweep, *RUN, *prune, "data.train_samples=64", "epochs=2")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("last / first") == len(NARROW)
    for job in range(len(NARROW)):
        path = tmp_path / "sweep" / str(job) / "last.pt"
        facts = contents(path)["facts"]
        final = facts["history"][-1]["params"]
        assert 0 < final < facts["initial"]["params"]
        loaded = morphtrain.load(path)
        assert sum(p.numel() for p in loaded.parameters()) == final
        assert loaded(torch.zeros(2, 3, 8, 8)).shape == (2, 10)


# -- made as the config says -----------------------------------------------------------------------------------------


def test_the_constructor_gets_the_config_and_what_it_asks_of_the_data(package: Path) -> None:
    run = built(*NET, "+model.act={name:relu}")
    own = importlib.import_module("own_net")
    assert own.calls[-1] == (10, 1, 8, [{"multiple": 1}, {"multiple": 1}], {"name": "relu"})
    # It emptied its own list, not the one that a checkpoint will hold.
    assert run.config.model.arguments["stages"] == [{"multiple": 1}, {"multiple": 1}]
    keys = flat(dataclasses.asdict(run.config))
    assert keys["model._target_"] == "own_net.Net"
    assert (keys["model.width"], keys["model.act.name"]) == (8, "relu")
    assert not any("arguments" in key for key in keys)


def test_what_the_config_sets_is_not_taken_from_the_data(package: Path) -> None:
    config = schema.Custom("own_net.Net", {"num_classes": 3})
    model = own_model(config, 10, 1)
    assert (model.classifier.out_features, model.layers[0].in_channels) == (3, 1)
    assert own_model(schema.Custom("own_net.small", {}), 5, 2).classifier.out_features == 5  # through **kwargs
    plain = own_model(schema.Custom("torch.nn.Linear", {"in_features": 4, "out_features": 2}), 10, 1)
    assert isinstance(plain, nn.Linear)


WRONG = {
    "own_net.Nett": "own_net has no Nett; did you mean Net",
    "own_net.Zzzzzz": "own_net has no Zzzzzz; its networks: .*Block, Net, Other",
    "own_nett.Net": "there is no module own_nett, .*current directory",
    "own_net.sub.Net": "there is no module own_net.sub",
    "own_net.calls": "is an object of type list; name a class",
    "own_net.made": "is an object of type Net; name a class",
    "own_net.torch": "is an object of type module; name a class",
    "own_net.text": "makes a str, not a torch.nn.Module",
    "own_net.Linear": r"called with \(\): .*in_features",
    "own_net.Net": r"called with \(num_classes=10, in_channels=3, wdith=3\): .*unexpected keyword argument 'wdith'",
    "own_typo.Net": "importing own_typo fails: .*own_typo.py, line 1",
    "own_needs.Net": "importing own_needs fails: No module named 'own_absent'",
    "own_old.Net": "importing own_old fails: cannot import name 'Absent'",
}


@pytest.mark.parametrize("target", WRONG)
def test_what_cannot_be_made_is_named(target: str, package: Path) -> None:
    (package / "own_typo.py").write_text("class Net(:")
    (package / "own_needs.py").write_text("import own_absent")
    (package / "own_old.py").write_text("from torch import Absent")
    arguments = {"wdith": 3} if target == "own_net.Net" else {}
    with pytest.raises(UserError, match=f"^model._target_={target}: {WRONG[target]}"):
        own_model(schema.Custom(target, arguments), 10, 3)


# -- outputs ---------------------------------------------------------------------------------------------------------


class Outputs(nn.Module):
    """A network that returns what it is told to, per mode."""

    def __init__(self, training: Callable[..., Any], evaluation: Callable[..., Any]) -> None:
        super().__init__()
        self.made = {True: training, False: evaluation}
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))

    def forward(self, x: torch.Tensor) -> Any:
        return self.made[self.training](self.layers(x).mean((2, 3)))


def same(x: torch.Tensor) -> torch.Tensor:
    return x


BAD_OUTPUTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a tuple in training": (lambda: Outputs(lambda x: (x, x), same), "returns a tuple in training mode"),
    "a dict in evaluation": (lambda: Outputs(same, lambda x: {"x": x}), "returns a dict in evaluation mode"),
    "too many classes": (lambda: Outputs(lambda x: x.repeat(1, 2), same), r"a tensor of \(2, 8\) in training mode"),
    "an image": (lambda: Outputs(lambda x: x[:, :, None], same), r"a tensor of \(2, 4, 1\) in training mode"),
    "other channels": (lambda: nn.Conv2d(1, 4, 3), r"cannot take images of \(3, 8, 8\) in training mode: .*1 channels"),
    "too small": (lambda: nn.Conv2d(3, 4, 9), r"cannot take images of \(3, 8, 8\) .*[Kk]ernel size"),
    "lazy": (lambda: nn.LazyConv2d(4, 3), "lazy layers"),
    "nothing to train": (lambda: nn.Flatten(), "no parameter to train"),
}


@pytest.mark.parametrize("case", BAD_OUTPUTS)
def test_outputs_the_loss_cannot_use_are_named(case: str) -> None:
    make, message = BAD_OUTPUTS[case]
    with pytest.raises(UserError, match=f"model=own: .*{message}"):
        check_outputs("model=own", make(), (3, 8, 8), 4)


def test_checking_the_outputs_leaves_no_mark() -> None:
    model = Outputs(same, same)
    model.layers[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes, random_state = [m.training for m in model.modules()], torch.get_rng_state()
    check_outputs("model=own", model, (3, 8, 8), 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in model.parameters())


def test_a_network_with_two_outputs_ends_the_command_with_a_message(command: Command, tmp_path: Path) -> None:
    (tmp_path / "own_net.py").write_text(PACKAGE)
    result = command(*RUN, "model=custom", "model._target_=own_net.Pair")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "model=own_net.Pair: returns a tuple in training mode" in result.stderr
    assert not list((tmp_path / "outputs").rglob("*.pt"))


# -- checkpoints of every model --------------------------------------------------------------------------------------

STORED = {
    "resnet, ImageNet stem": ["model=resnet", "model.stem=imagenet", "model.width=4", "model.blocks=1"],
    "bottleneck": ["model=resnet50", "model.stem=cifar", "model.width=4", "model.blocks=1"],
    "vgg": ["model=vgg11", "model.width=4"],
    "vgg without norm": ["model=vgg8", "model.width=4", "model.batch_norm=false", "model.dropout=0.2"],
    "alexnet": ["model=alexnet", "model.batch_norm=true"],
    "mobilenet v1": ["model=mobilenet_v1", "model.width_multiplier=0.25"],
    "mobilenet v2": ["model=mobilenet_v2", "model.width_multiplier=0.1"],
    "torchvision": ["model=torchvision", "model.name=shufflenet_v2_x0_5"],
    "own": NET,
}


@pytest.mark.parametrize("case", STORED)
def test_a_morphed_network_comes_back_from_its_checkpoint_alone(case: str, package: Path) -> None:
    run = built(*STORED[case])
    space = max(run.graph.spaces, key=lambda space: space.size)
    run.graph.reindex(space, range(0, space.size, 2), run.optimizer)
    with torch.no_grad():
        for tensor in run.model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) / 10)
    checkpoint.save(run, package, None)
    random_states = torch.get_rng_state(), random.getstate()
    loaded = morphtrain.load(package / "last.pt")
    assert (torch.get_rng_state().equal(random_states[0]), random.getstate()) == (True, random_states[1])
    assert not loaded.training
    x = torch.randn(2, 1, 16, 16)
    assert torch.equal(loaded(x), run.model.eval()(x))


# -- nothing runs because a file says so -----------------------------------------------------------------------------


@pytest.fixture
def stored(package: Path) -> Callable[..., Path]:
    """Writes a checkpoint of `own_net.Net` whose `model` has been tampered with; `own_net` is forgotten afterwards."""
    checkpoint.save(built(*NET), package, None)
    del sys.modules["own_net"]
    content = torch.load(package / "last.pt", weights_only=True)

    def write(model: Any = None) -> Path:
        facts = json.loads(content["facts"])
        facts["config"]["model"] = model or facts["config"]["model"]
        path = package / "stored.pt"
        checkpoint_file.write(path, {**content, "facts": json.dumps(facts)})
        return path

    return write


def test_a_network_nobody_imported_is_refused_and_not_imported(stored: Callable[..., Path]) -> None:
    path = stored()
    with pytest.raises(UserError, match=r"the network is own_net.Net: import own_net first, or pass model="):
        morphtrain.load(path)
    assert "own_net" not in sys.modules
    own = importlib.import_module("own_net")
    assert type(morphtrain.load(path)) is own.Net


def test_a_function_or_a_class_can_be_passed(stored: Callable[..., Path]) -> None:
    path = stored()
    own = importlib.import_module("own_net")
    by_class, by_function = morphtrain.load(path, own.Net), morphtrain.load(path, model=lambda **kw: own.Net(**kw))
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(by_class(x), by_function(x))
    assert by_class.temperature == by_function.temperature != own.Net(2, 3).temperature  # drawn from the run's seed
    with pytest.raises(UserError, match=r"own_net.Net is not the network it was written with"):
        morphtrain.load(path, own.Other)
    with pytest.raises(UserError, match=r"called with .*width=8"):
        morphtrain.load(path, own.Linear)
    with pytest.raises(UserError, match="makes a str"):
        morphtrain.load(path, lambda **kw: "text")


def test_only_a_class_of_the_imported_package_is_called(stored: Callable[..., Path]) -> None:
    own = importlib.import_module("own_net")
    own.__getattr__ = lambda name: pytest.fail(f"the file had {name} looked up")
    for name in ("small", "made", "calls", "Linear", "absent", "torch"):
        path = stored({"_target_": f"own_net.{name}", "arguments": {"in_features": 1, "out_features": 1}})
        with pytest.raises(UserError, match=f"the network is own_net.{name}, .* pass model=own_net.{name}"):
            morphtrain.load(path)


EVIL = {
    "a function": {"_target_": "os.system", "arguments": {"command": "touch pwned"}},
    "a builtin": {"_target_": "builtins.exec", "arguments": {"source": "open('pwned', 'w')"}},
    "a class": {"_target_": "subprocess.Popen", "arguments": {"args": ["touch", "pwned"]}},
    "a module": {"_target_": "own_evil.Net", "arguments": {}},
    "a module of this package": {"_target_": "morphtrain.own_evil.Net", "arguments": {}},
    "an option": {"name": "own_evil"},
    "a path": {"name": "../own_evil"},
    "a source": {"source": "own_evil", "name": "resnet"},
    "a list": {"name": ["resnet"]},
    "weights": {"source": "torchvision", "name": "resnet18", "options": {"weights": "DEFAULT"}},
    "pretrained": {"source": "torchvision", "name": "resnet18", "options": {"pretrained": True}},
    "a name": {"source": "torchvision", "name": "own_evil", "options": {}},
    "no name": {"source": "torchvision", "name": {"a": 1}, "options": {}},
    "no dict": {"_target_": "own_net.Net", "arguments": ["x"]},
    "no keywords": {"_target_": "own_net.Net", "args": {}},
    "no text": {"_target_": 3, "arguments": {}},
    "another key": {"name": "resnet", "evil": 1},
}


@pytest.mark.parametrize("case", EVIL)
def test_a_malicious_checkpoint_is_refused(case: str, stored: Callable[..., Path], monkeypatch: Any) -> None:
    path = stored(EVIL[case])
    (path.parent / "own_evil.py").write_text("open('pwned', 'w')")
    monkeypatch.chdir(path.parent)
    with pytest.raises(UserError, match=r"model|the network is|options"):
        morphtrain.load(path)
    assert not (path.parent / "pwned").exists()
    assert "own_evil" not in sys.modules
    assert "own_net" not in sys.modules


def test_resuming_with_other_keys_is_refused(stored: Callable[..., Path]) -> None:
    run = built(*NET)
    other = schema.Custom("own_net.Net", {**run.config.model.arguments, "width": 9})
    with pytest.raises(UserError, match=r"model.width=9: .* was written with model.width=8"):
        checkpoint.Checkpoint(stored()).restore(dataclasses.replace(run.config, model=other))
    renamed = schema.Custom("own_net.Other", run.config.model.arguments)
    with pytest.raises(UserError, match=r"model._target_=own_net.Other: .* with model._target_=own_net.Net"):
        checkpoint.Checkpoint(stored()).restore(dataclasses.replace(run.config, model=renamed))


def test_passing_what_is_not_needed_is_refused(tmp_path: Path) -> None:
    checkpoint.save(built("model.width=4"), tmp_path, None)
    with pytest.raises(UserError, match="holds the model resnet, which needs no model="):
        morphtrain.load(tmp_path / "last.pt", nn.Linear)


def test_a_checkpoint_of_another_version_is_named(tmp_path: Path) -> None:
    torch.save({"format": "morphtrain checkpoint 1", "facts": "{}"}, tmp_path / "old.pt")
    with pytest.raises(UserError, match=r"'morphtrain checkpoint 6', not 'morphtrain checkpoint 1'"):
        morphtrain.load(tmp_path / "old.pt")
