"""Training that starts from trained weights: what is read, what fits, which layer is new, what is left of the file."""

from __future__ import annotations

import json
import logging
import math
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Answer, Command, Kill
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import in_ranks
from test_resume import assert_same, ends
from torch import nn

import morphtrain
from morphtrain import options, world
from morphtrain.cost import count_params
from morphtrain.errors import UserError
from morphtrain.export.__main__ import main as export
from morphtrain.morph import describe
from morphtrain.preprocessing import Preprocessing
from morphtrain.state import Run
from morphtrain.trainer import new_run, start, train
from morphtrain.trainer.build import build_model
from morphtrain.trainer.trained_fit import load
from morphtrain.trainer.trained_images import differences

DATA = ("data=synthetic", "data.train_samples=64", "data.val_samples=16", "data.image_size=32", "tracking=none")
NETS = {
    "resnet": ("model=resnet8", "model.width=4"),
    "vgg": ("model=vgg8", "model.width=4"),
    "mobilenet": ("model=mobilenet_v2", "model.width_multiplier=0.25"),
    "alexnet": ("model=alexnet",),
    "torchvision": ("model=torchvision", "model.name=squeezenet1_1"),
    "custom": ("model=custom", "model._target_=own_trained.Net", "+model.width=6"),
}
OWN = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes, in_channels, width):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(in_channels, width, 3), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))
"""
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a network of the user's own."""
    (tmp_path / "own_trained.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def started(*overrides: str) -> Run:
    return new_run(morphtrain.compose(*DATA, *overrides), torch.device("cpu"))


def dense(*overrides: str) -> nn.Module:
    """The network of a run with these overrides, with fresh weights."""
    config = morphtrain.compose(*overrides)
    data: Any = config.data
    given = {"num_classes": data.num_classes, "in_channels": data.in_channels}
    return build_model(config.model, lambda: options.build("model", config.model, **given), config.norm, config.seed)


def stirred(model: nn.Module) -> nn.Module:
    """The network with all of its values changed, statistics of its norms too."""
    generator = torch.Generator().manual_seed(3)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.mul_(torch.rand(tensor.shape, generator=generator) + 0.5).add_(0.01)
    return model


@torch.no_grad()
def outputs(model: nn.Module, images: torch.Tensor = IMAGES) -> torch.Tensor:
    found: torch.Tensor = model.eval()(images)
    return found


@pytest.mark.parametrize("net", NETS)
def test_every_network_starts_from_a_state_dict(net: str, here: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first = stirred(dense(*DATA, *NETS[net], "data.num_classes=5"))
    torch.save(first.state_dict(), here / "net.pt")
    again = started(*NETS[net], "data.num_classes=5", "model.weights=net.pt", "seed=2")
    assert torch.equal(outputs(again.model), outputs(first))
    assert "last layer" not in caplog.text

    other = started(*NETS[net], "data.num_classes=7", "model.weights=net.pt", "seed=2")
    fresh = dense(*DATA, *NETS[net], "data.num_classes=7", "seed=2").state_dict()
    stored, now = first.state_dict(), other.model.state_dict()
    head = [name for name in now if now[name].shape != stored[name].shape]
    assert 1 <= len(head) <= 2
    for name, tensor in now.items():
        assert torch.equal(tensor, (fresh if name in head else stored)[name]), name
    (line,) = (record.message for record in caplog.records if "last layer" in record.message)
    assert "for 7 classes instead of 5" in line and all(name in line for name in head)


@pytest.mark.parametrize("options", [("norm=ghost", "precision=o1"), ("precision=o3",), ("precision=bf16_pure",)])
def test_other_norms_and_number_formats(options: tuple[str, ...], here: Path) -> None:
    first = stirred(dense(*DATA, *NETS["resnet"]))
    torch.save(first.state_dict(), here / "net.pt")
    model = started(*NETS["resnet"], "model.weights=net.pt", *options).model.float()
    assert torch.allclose(outputs(model), outputs(first), rtol=0.05, atol=0.05 * outputs(first).abs().max().item())


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 5, 1)))


WORDS = st.sampled_from(["module", "model", "net", "_orig_mod", "0", "2", "backbone"])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prefix=st.lists(WORDS, max_size=3), places=st.lists(WORDS, max_size=2), more=st.booleans())
def test_prefixes_and_nesting(prefix: list[str], places: list[str], more: bool) -> None:
    """Whatever stands in front of all names, and wherever in the file the tensors are."""
    wanted, model = stirred(layers()), layers()
    content: Any = {".".join([*prefix, name]): tensor for name, tensor in wanted.state_dict().items()}
    for place in places:
        content = {place: content} | ({"epoch": 3, "optimizer": {"state": {0: {"m": torch.ones(2)}}}} if more else {})
    from morphtrain.trainer.trained_file import _state_dicts

    assert load("model.weights=x", model, dict(_state_dicts(content)), 5) is None
    assert_same(dict(model.state_dict()), dict(wanted.state_dict()))


def changed(**changes: Any) -> dict[str, torch.Tensor]:
    """A state dict of `layers` with other tensors; None leaves one out."""
    content = dict(layers().state_dict()) | {name.replace("_", "."): value for name, value in changes.items()}
    return {name: value for name, value in content.items() if value is not None}


ENDLESS: dict[str, Any] = {}
ENDLESS["state"] = ENDLESS


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (changed(**{"0_weight": None}), ["it lacks 0.weight", "the network that it was trained as"]),
        (changed(extra=torch.ones(1)), ["it has extra besides"]),
        (
            changed(**{"0_weight": torch.ones(4, 1, 3, 3)}),
            ["0.weight is (4, 1, 3, 3), here (4, 3, 3, 3)", "1 channel "],
        ),
        (changed(**{"0_bias": torch.ones(6)}), ["0.bias is (6,), here (4,)", "last.pt"]),
        (changed(**{"0_bias": torch.ones(4, dtype=torch.int32)}), ["0.bias is int32, here float32"]),
        (changed(**{"0_bias": torch.ones(4, device="meta")}), ["0.bias is meta float32, here float32"]),
        (changed(**{"0_bias": torch.ones(4).to_sparse()}), ["0.bias is sparse_coo float32, here float32"]),
        (changed(**{"0_bias": torch.full((4,), math.nan)}), ["infinite or no number in 0.bias"]),
        (changed(**{"0_bias": torch.full((4,), 1e300, dtype=torch.double)}), ["infinite or no number in 0.bias"]),
        ({"a": torch.ones(1), "b": torch.ones(1)}, ["no name", "it has a, b", "0.weight"]),
        ({"model": changed(), "ema": changed()}, ["several networks", "ema, model"]),
        (
            {f"{side}.{k}": v for side in ("student", "teacher") for k, v in changed().items()},
            ["below student., teacher."],
        ),
        ({"epoch": 3, "lr": [0.1]}, ["holds no state_dict"]),
        ([1, 2], ["holds no state_dict"]),
        (ENDLESS, ["dicts within dicts without an end"]),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(content: Any, said: list[str], here: Path) -> None:
    from morphtrain.trainer.trained_file import read

    torch.save(content, here / "net.pt")
    model = layers()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        load("model.weights=net.pt", model, read("model.weights=net.pt", here / "net.pt").sets, 5)
    message = str(error.value)
    assert message.startswith("model.weights=net.pt: ") and "\n" not in message
    assert all(text in message for text in said), message
    assert_same(dict(model.state_dict()), before)


def test_a_middle_layer_is_no_head() -> None:
    """Of as many channels as there are classes: what follows it does not fit either."""
    here, there = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(UserError, match="does not fit"):
        load("model.weights=x", here, {"": there.state_dict()}, 5)


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (Path("exploded"),)


@pytest.mark.parametrize("damage", ["missing", "bomb", "network", "text", "cut off", "safetensors", "checkpoint"])
def test_files_that_cannot_be_read(damage: str, here: Path) -> None:
    path = here / ("net.safetensors" if damage == "safetensors" else "net.pt")
    content = {"bomb": Bomb(), "network": layers()}.get(damage)
    if content is not None:
        torch.save(content, path)
    elif damage in ("text", "safetensors"):
        path.write_text("weights")
    elif damage == "cut off":
        torch.save(layers().state_dict(), path)
        path.write_bytes(path.read_bytes()[:-300])
    elif damage == "checkpoint":
        morphtrain.save(layers(), path)
        path.write_bytes(path.read_bytes()[:-80] + b"0" * 16 + path.read_bytes()[-64:])
    if damage == "safetensors":
        pytest.importorskip("safetensors")
    with pytest.raises(UserError) as error:
        started(*NETS["resnet"], f"model.weights={path.name}")
    assert str(error.value).startswith(f"model.weights={path.name}: ") and "\n" not in str(error.value)
    assert len(str(error.value)) < 250, "without torch's advice"
    assert not (here / "exploded").exists()


def test_safetensors(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numpy = pytest.importorskip("safetensors.torch")
    first = stirred(dense(*DATA, *NETS["resnet"]))
    tensors = {f"module.{name}": tensor.contiguous() for name, tensor in first.state_dict().items()}
    numpy.save_file(tensors, here / "net.safetensors")
    numpy.save_file(tensors, here / "net.bin")
    for name in ("net.safetensors", "net.bin"):
        assert torch.equal(outputs(started(*NETS["resnet"], f"model.weights={name}").model), outputs(first))
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match=r"pip install 'morphtrain\[safetensors\]'"):
        started(*NETS["resnet"], "model.weights=net.safetensors")


# -- our own files --------------------------------------------------------------------------------------------------

CHANGED = {
    "pruned": ("prune.lasso_ratio=0.97",),
    "gated": ("prune.residual=gating", "model.shortcut=B"),
    "weight norm": ("norm=weight", "optimizer.lr=0.03"),
    "wider": ("prune=none", "grow=wider", "grow.at_epochs=[1]"),
    "deeper": ("prune=none", "grow=deeper", "grow.at_epochs=[1]"),
}


SLOW = ("wider", "weight norm")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a run whose network was changed, by kind; each is trained once."""
    found: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in found:
            found[kind] = tmp_path_factory.mktemp(kind.replace(" ", "_"))
            train(morphtrain.compose(*small_of(kind), "epochs=3"), found[kind], {})
        return found[kind]

    return run


def small_of(kind: str) -> list[str]:
    """The overrides of a run of this kind."""
    own = CHANGED[kind]
    pruned = [o for o in SMALL if "prune=none" not in own or not o.startswith("prune")]
    return [*pruned, "tracking=none", "timing.reference=0", *own]


def plain_of(kind: str) -> list[str]:
    """Those of its network and data, without what changed it."""
    return [o for o in small_of(kind) if not o.startswith(("prune", "grow", "epochs"))]


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k in SLOW)) for k in CHANGED])
def test_a_changed_network_goes_on(kind: str, runs: Callable[[str], Path]) -> None:
    directory = runs(kind)
    trained = morphtrain.load(directory / "last.pt")
    images = torch.randn(4, 3, 8, 8)
    plain = plain_of(kind)
    same = new_run(morphtrain.compose(*plain, f"model.weights={directory}/last.pt", "seed=4"), torch.device("cpu"))
    start(same)  # a norm that starts from data must leave it as it is
    assert torch.equal(outputs(same.model, images), outputs(trained, images))
    assert kind == "weight norm" or same.params != count_params(dense(*plain))

    other = new_run(
        morphtrain.compose(*plain, f"model.weights={directory}/last.pt", "data.num_classes=7"), torch.device("cpu")
    )
    stored, now = trained.state_dict(), other.model.state_dict()
    assert stored.keys() == now.keys()
    head = [name for name in now if now[name].shape != stored[name].shape]
    assert {name.partition(".")[0] for name in head} == {"classifier"}
    assert all(torch.equal(now[name], stored[name]) for name in now if name not in head)
    assert all(now[name].shape == (7, *stored[name].shape[1:]) and now[name].isfinite().all() for name in head)
    assert outputs(other.model, images).shape == (4, 7)
    assert outputs(other.model, images).std() > 0


def test_pruned_on_and_loaded_again(runs: Callable[[str], Path], tmp_path: Path) -> None:
    """Lasso from trained weights, on other classes: the network shrinks further, and its checkpoint stands alone."""
    weights = runs("pruned") / "best.pt"
    train(morphtrain.compose(*small_of("pruned"), f"model.weights={weights}", "data.num_classes=4"), tmp_path, {})
    first, last = morphtrain.load(weights), morphtrain.load(tmp_path / "last.pt")
    count = [sum(p.numel() for p in network.parameters()) for network in (first, last)]
    assert count[1] < count[0]
    assert outputs(last, torch.randn(2, 3, 8, 8)).shape == (2, 4)


def test_an_export_brings_its_structure_along(runs: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "small.state_dict.pt"
    assert export([str(runs("pruned") / "last.pt"), "--format", "state_dict", "--output", str(file)]) == 0
    trained, images = morphtrain.load(runs("pruned") / "last.pt"), torch.randn(4, 3, 8, 8)
    plain = plain_of("pruned")
    for classes in (10, 3):
        run = new_run(morphtrain.compose(*plain, f"model.weights={file}", f"data.num_classes={classes}"))
        body = dict(run.model.state_dict()), dict(trained.state_dict())
        assert all(torch.equal(body[0][name], body[1][name]) for name in body[0] if "classifier" not in name)
        assert outputs(run.model, images).shape == (4, classes)
    (tmp_path / "small.architecture.json").unlink()
    with pytest.raises(UserError, match=r"small\.architecture|\.architecture\.json"):
        new_run(morphtrain.compose(*plain, f"model.weights={file}"))


@pytest.mark.parametrize(
    ("damage", "classes"),
    [("list", 10), ("nothing", 3), ("dimensions", 3), ("huge", 10), ("huge", 3), ("path", 10), ("images", 3)],
)
def test_what_lies_beside_an_export_may_be_anything(
    damage: str, classes: int, runs: Callable[[str], Path], tmp_path: Path
) -> None:
    trained = morphtrain.load(runs("pruned") / "last.pt")
    torch.save(trained.state_dict(), tmp_path / "small.state_dict.pt")
    structure: Any = describe(trained)
    shapes = structure["shapes"]
    images: Any = {"num_classes": 10}
    if damage in ("list", "nothing"):
        structure = [] if damage == "list" else {}
    elif damage == "dimensions":
        shapes["classifier.weight"] = [10]
    elif damage == "huge":
        shapes["classifier.weight"] = [10, 10**12]
    elif damage == "path":
        shapes["nowhere.weight"] = [3]
    else:
        images = {"mean": "bright"}
    (tmp_path / "small.architecture.json").write_text(json.dumps(structure))
    (tmp_path / "small.preprocessing.json").write_text(json.dumps(images))
    config = morphtrain.compose(
        *plain_of("pruned"), f"model.weights={tmp_path}/small.state_dict.pt", f"data.num_classes={classes}"
    )
    with pytest.raises(UserError) as error:
        new_run(config, torch.device("cpu"))
    assert str(error.value).startswith(f"model.weights={tmp_path}/small.state_dict.pt: ")
    assert "\n" not in str(error.value)


def test_a_structure_may_come_from_elsewhere(runs: Callable[[str], Path], tmp_path: Path) -> None:
    """`architecture` gives the structure, `model.weights` the values."""
    last = runs("pruned") / "last.pt"
    trained = morphtrain.load(last)
    torch.save(trained.state_dict(), tmp_path / "values.pt")
    plain = [*plain_of("pruned"), f"architecture={last}"]
    for weights in (tmp_path / "values.pt", last):
        run = new_run(morphtrain.compose(*plain, f"model.weights={weights}"))
        assert_same(dict(run.model.state_dict()), dict(trained.state_dict()))


def test_another_network_is_refused(runs: Callable[[str], Path]) -> None:
    weights = f"model.weights={runs('pruned')}/last.pt"
    with pytest.raises(UserError, match=r"model\.width=16: model\.weights=.* was written with model\.width=8"):
        new_run(morphtrain.compose(*plain_of("pruned"), weights, "model.width=16"))
    with pytest.raises(UserError, match=r"images with 3 channels, the data has 1; data with as many works"):
        new_run(morphtrain.compose(*plain_of("pruned"), weights, "data.in_channels=1"))
    with pytest.raises(UserError, match="norm=weight works"):
        new_run(morphtrain.compose(*plain_of("pruned"), f"model.weights={runs('weight norm')}/last.pt"))
    with pytest.raises(UserError, match="norm=batch works"):
        new_run(morphtrain.compose(*plain_of("weight norm"), weights))


def test_killed_and_resumed_without_the_file(
    runs: Callable[[str], Path], tmp_path: Path, command: Command, kill: Kill
) -> None:
    """A resumed run needs the file no more, and ends with the same bits."""
    file = tmp_path / "start.pt"
    file.write_bytes((runs("pruned") / "last.pt").read_bytes())
    options = [*small_of("pruned"), "epochs=3", "data.num_classes=4", "model.weights=start.pt", "seed=2"]
    whole = command(*options, "hydra.run.dir=once")
    assert whole.returncode == 0, whole.stderr
    kill("rename:3", *options, "hydra.run.dir=twice")
    facts = json.loads((tmp_path / "twice" / "environment.json").read_text())
    file.unlink()
    assert command(*options, "hydra.run.dir=twice", "resume=auto").returncode == 0
    assert_same(ends(tmp_path / "once"), ends(tmp_path / "twice"))
    assert json.loads((tmp_path / "twice" / "environment.json").read_text()) == facts
    assert facts["weights"] == "start.pt" and len(facts["weights_sha256"]) == 64


def test_a_missing_file_leaves_nothing(answer: Answer, tmp_path: Path) -> None:
    said = answer("model.weights=start.pt", "hydra.run.dir=new", "tracking=none")
    assert said.startswith("model.weights=start.pt: there is no such file; the path of a state_dict")
    assert not (tmp_path / "new").exists()


def test_a_run_of_before_the_key_goes_on(runs: Callable[[str], Path]) -> None:
    """Checkpoints of older versions do not say what a network started from."""
    from morphtrain.trainer import checkpoint

    stored = checkpoint.Checkpoint(runs("pruned") / "last.pt")
    del stored.facts["config"]["model"]["weights"], stored.facts["started_from"]
    config = morphtrain.compose(*small_of("pruned"), "epochs=3")
    assert stored.restore(config).started_from == {}
    assert stored.model() is not None
    with pytest.raises(UserError, match=r"model\.weights=x\.pt: .* was written with model\.weights=null"):
        stored.restore(morphtrain.compose(*small_of("pruned"), "epochs=3", "model.weights=x.pt"))


def test_build_run_alone_does_not_pass_over_the_key() -> None:
    from morphtrain.trainer import build_run

    with pytest.raises(UserError, match="new_run"):
        build_run(morphtrain.compose(*DATA, "model.weights=x.pt"))


# -- names of torchvision's -----------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Mapping[str, torch.Tensor]], None]:
    """Puts a file where torchvision looks for the published weights of a network before it downloads them."""
    from torchvision import models

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))

    def put(name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        file = tmp_path / "hub" / "hub" / "checkpoints" / Path(models.get_model_weights(name)["DEFAULT"].url).name
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(dict(tensors), file)

    return put


@pytest.mark.parametrize("name", ["squeezenet1_1", pytest.param("densenet121", marks=pytest.mark.slow)])
def test_published_weights_are_those_that_torchvision_loads(name: str, hub: Callable[..., None]) -> None:
    from torchvision import models

    tensors = stirred(models.get_model(name)).state_dict()
    if name == "densenet121":  # its file has older names
        import re

        tensors = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", key): v for key, v in tensors.items()}
    hub(name, tensors)
    model = ("model=torchvision", f"model.name={name}", "data.num_classes=1000")
    run = started(*model, "model.weights=DEFAULT")
    peer = models.get_model(name, weights="DEFAULT")
    assert torch.equal(outputs(run.model), outputs(peer))
    enum = type(models.get_model_weights(name)["DEFAULT"]).__name__
    assert started(*model, f"model.weights={enum}.IMAGENET1K_V1").started_from["weights_sha256"]


def test_what_their_images_were_is_said(hub: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    from torchvision import models

    caplog.set_level(logging.INFO)
    hub("squeezenet1_1", models.get_model("squeezenet1_1").state_dict())
    started("model=torchvision", "model.name=squeezenet1_1", "model.weights=DEFAULT")
    (line,) = (record.message for record in caplog.records if "other images" in record.message)
    assert "3x224x224, here 3x32x32" in line and "mean 0.485 0.456 0.406, deviation 0.229 0.224 0.225" in line


@pytest.mark.parametrize(
    ("model", "weights", "said"),
    [
        ("squeezenet1_1", "IMAGENET1K_V3", "did you mean IMAGENET1K_V1"),
        ("squeezenet1_1", "photos", "there are DEFAULT, IMAGENET1K_V1|there are IMAGENET1K_V1, DEFAULT"),
        ("squeezenet1_1", "some/net.pt", "there is no such file"),
        ("squeeznet", "DEFAULT", r"model\.name=squeeznet: .*did you mean squeezenet"),
        ("googlenet", "DEFAULT", r"\+model\.options\.transform_input=true"),
    ],
)
def test_names_that_are_wrong(model: str, weights: str, said: str, here: Path) -> None:
    with pytest.raises(UserError, match=said):
        started("model=torchvision", f"model.name={model}", f"model.weights={weights}")
    with pytest.raises(UserError, match="there is no such file"):
        started(*NETS["resnet"], "model.weights=DEFAULT")


def test_without_a_network(hub: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(UserError) as error:
        started("model=torchvision", "model.name=squeezenet1_1", "model.weights=DEFAULT")
    message = str(error.value)
    assert message.startswith("model.weights=DEFAULT: https://") and "no route to host" in message
    assert "hub/checkpoints/squeezenet1_1-" in message and "\n" not in message


def test_images_that_differ() -> None:
    said = Preprocessing([127.5], [51.0], 255, None, (1, 28, 28))
    assert differences(said, said) == ""
    assert differences(said, Preprocessing([0.5], [0.2], 1, None, (1, 28, 28))) == ""  # other units
    assert differences(Preprocessing(), said) == ""
    other = Preprocessing([0.5] * 3, [0.3] * 3, 1, None, (3, 8, 8))
    assert differences(said, other) == (
        "1x28x28, here 3x8x8; normalised by mean 0.500, deviation 0.200, "
        "here by mean 0.500 0.500 0.500, deviation 0.300 0.300 0.300"
    )
    assert "as nobody has said" in differences(said, Preprocessing())


def values_in_rank(file: str) -> tuple[float, dict[str, str]]:
    """What a process starts from; only the first one has the file."""
    torch.set_num_threads(1)
    config = morphtrain.compose(*DATA, *NETS["resnet"], f"model.weights={file if world.is_main() else 'none.pt'}")
    run = new_run(config, torch.device("cpu"))
    return sum(tensor.double().sum().item() for tensor in run.model.state_dict().values()), run.started_from


def test_one_of_several_processes_reads_the_file(here: Path) -> None:
    first = stirred(dense(*DATA, *NETS["resnet"]))
    torch.save(first.state_dict(), here / "net.pt")
    wanted = sum(tensor.double().sum().item() for tensor in first.state_dict().values())
    found = in_ranks(2, values_in_rank, str(here / "net.pt"))
    assert [value for value, _ in found] == [wanted, wanted]
    assert found[0][1]["weights_sha256"] == found[1][1]["weights_sha256"]


# -- beside runs ----------------------------------------------------------------------------------------------------


def test_the_largest_batch_is_that_of_the_pruned_network(
    runs: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from test_maxbatch import parsed

    from morphtrain.trainer.max_batch_report import show_max_batch

    common = [o for o in plain_of("pruned") if o.startswith(("model", "data=", "data.image"))]
    common += ["budget=50MiB", "throughput_seconds=0", "device=cpu"]
    sizes = [
        show_max_batch(parsed(*common, *more), ["model"]) for more in ([], [f"model.weights={runs('pruned')}/last.pt"])
    ]
    assert sizes[1] > sizes[0]
    capsys.readouterr()


def test_from_scratch_means_fresh_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arm of an experiment that trains a structure again, where the experiment starts from trained weights."""
    from morphtrain.experiment.sweeper import ArmsSweeper

    arms = {"scratch": types.SimpleNamespace(overrides=["prune=none"])}
    experiment: Any = types.SimpleNamespace(overrides=["model.weights=base.pt"], arms=arms)
    monkeypatch.setattr("morphtrain.experiment.runs.epochs_in_the_same_seconds", lambda history: 3)
    after = types.SimpleNamespace(directory=tmp_path, history=list)
    run: Any = types.SimpleNamespace(seed=1, arm="scratch", after=after)
    sweeper: Any = types.SimpleNamespace(directory="here")
    given: Any = types.SimpleNamespace(aside=[])
    found = _job_of(ArmsSweeper)(sweeper, experiment, run, [], given, None)
    assert "model.weights=null" in found and "model.weights=base.pt" not in found


def _job_of(kind: Any) -> Any:
    return next(vars(base)["_job"] for base in kind.__mro__ if "_job" in vars(base))
