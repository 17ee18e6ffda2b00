"""What is exported computes what the network computes, for a batch of any size, without MorphTrain."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from test_networks import CASES, EXAMPLE, Net, narrower, pruned
from torch import nn

import morphtrain
from morphtrain import morph
from morphtrain.compare import __main__ as compare
from morphtrain.errors import UserError
from morphtrain.evidence import __main__ as evidence
from morphtrain.export import FORMATS
from morphtrain.export.__main__ import main
from morphtrain.export.trace import trace
from morphtrain.export.write import export
from morphtrain.morph.layers import NoChannels, ScatterChannels, SelectChannels, ZeroBranch
from morphtrain.preprocessing import Preprocessing
from morphtrain.report import __main__ as report
from morphtrain.tracking import __main__ as sending
from morphtrain.trainer import checkpoint
from morphtrain.trainer.build import build_run

SAID = Preprocessing([0.5] * 3, [0.2] * 3, 1, None, (3, 16, 16), 10, list("abcdefghij"))


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16)


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert wanted.abs().max() > 0
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_onnx(case: str, tmp_path: Path) -> None:
    onnx, onnxruntime = (pytest.importorskip(name) for name in ("onnx", "onnxruntime"))
    network = pruned(case).train()
    written = export(network, tmp_path / "net.onnx", "onnx", SAID)
    assert network.training
    network.eval()
    assert 0 <= written.difference < 1e-5
    assert written.files == [tmp_path / "net.onnx", tmp_path / "net.preprocessing.json"]
    model = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(model)
    (given,), (made,) = model.graph.input, model.graph.output
    assert (given.name, made.name) == ("images", "logits")
    assert [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim] == ["batch", 3, 16, 16]
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    for count in (1, 2, 9):
        x = images(count)
        assert_close(torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), network(x))


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c == "mobilenet")) for c in CASES])
def test_torch_export(case: str, tmp_path: Path) -> None:
    network = pruned(case).eval()
    written = export(network, tmp_path / "net.pt2", "torch_export", SAID)
    assert 0 <= written.difference < 1e-5
    again = torch.export.load(tmp_path / "net.pt2").module()
    for count in (1, 2, 9):
        x = images(count)
        assert_close(again(x), network(x))


@pytest.mark.parametrize("case", CASES)
def test_state_dict(case: str, tmp_path: Path) -> None:
    network = pruned(case).eval()
    export(network, tmp_path / "net.pt", "state_dict", SAID)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.architecture.json", "net.preprocessing.json", "net.pt"]
    structure = json.loads((tmp_path / "net.architecture.json").read_text())
    again = morph.rebuild(CASES[case][0](), structure)
    again.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    assert torch.equal(again.eval()(EXAMPLE), network(EXAMPLE))


class Beside(nn.Module):
    """What surgery leaves where a block was, beside an identity, in both its forms."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, self.layer(x).expand(x.shape[0], -1, *x.shape[2:])], 1).flatten(1)


LAYERS = {
    "a removed branch": ZeroBranch(3, nn.BatchNorm2d(3)),
    "a removed branch, in full": ZeroBranch(3, bias=nn.Parameter(torch.ones(3)), stride=(1, 1)),
    "no channels": NoChannels(),
    "what a gate reads": SelectChannels(torch.tensor([2, 0])),
    "what a gate writes": ScatterChannels(torch.tensor([4, 0, 2]), 6),
}


@pytest.mark.parametrize("case", LAYERS)
def test_no_layer_of_ours_fixes_the_batch(case: str) -> None:
    network = Beside(LAYERS[case]).eval()
    program = trace(network, images(3)).module()
    for count in (1, 5):
        x = images(count)
        assert torch.equal(program(x), network(x))


class Fixed(nn.Module):
    """Its code fixes the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(len(x), -1)


class Noisy(Net):
    """Another output at every call, as dropout that is never switched off."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + torch.rand(())


@pytest.mark.parametrize(
    ("network", "said", "message"),
    [
        (Fixed(), SAID, "torch.export does not take this network: .*reads the batch size as x.shape"),
        (Noisy(), SAID, "differs from the network by .* of the largest output; tolerance=0.0001"),
        (Net(), Preprocessing(), "input_shape: .* not known"),
        (Net(), Preprocessing(input_shape=(1, 8, 8)), r"cannot take images of \(1, 8, 8\)"),
    ],
)
def test_what_cannot_be_exported_leaves_nothing(
    network: nn.Module, said: Preprocessing, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        export(network, tmp_path / "net.pt2", "torch_export", said)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("morphtrain.export.onnx.PACKAGES", ("onnx_of_nobody",))
    with pytest.raises(UserError, match=r"onnx_of_nobody not installed; pip install 'morphtrain\[export\]'"):
        export(Net(), tmp_path / "net.onnx", "onnx", SAID)


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """The checkpoint of a run."""
    run = build_run(morphtrain.compose(*SMALL))
    narrower(run.graph)
    checkpoint.save(run, tmp_path, None)
    return tmp_path / "last.pt"


def test_the_command(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a user of the file needs is in it and beside it: here, in a process without MorphTrain."""
    assert main([str(stored), "--format", "torch_export"]) == 0
    out = capsys.readouterr().out
    assert "last.pt2: differs from the network by at most" in out
    assert "images (batch, 3, 8, 8); not known, since the data set has not said it: classes" in out
    facts = json.loads((stored.parent / "last.preprocessing.json").read_text())
    assert (facts["input_shape"], facts["num_classes"], facts["classes"]) == ([3, 8, 8], 10, None)
    use = (
        "import sys, torch; sys.modules['morphtrain'] = None\n"
        f"print(torch.export.load({str(stored.with_suffix('.pt2'))!r}).module()(torch.ones(1, 3, 8, 8)).tolist())"
    )
    used = subprocess.run([sys.executable, "-c", use], capture_output=True, text=True, check=True)
    expected = morphtrain.load(stored)(torch.ones(1, 3, 8, 8))
    torch.testing.assert_close(torch.tensor(json.loads(used.stdout)), expected)


def test_a_network_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "nets_of_mine.py").write_text("from test_networks import Net\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = pruned("own")
    morphtrain.save(model, tmp_path / "net.pt")
    quick = [str(tmp_path / "net.pt"), "--format", "state_dict", "--output", str(tmp_path / "out.pt")]
    assert main(quick) == 1
    assert "pass model=" in capsys.readouterr().err
    assert main([*quick, "--model", "nets_of_mine.Net"]) == 1
    assert "--input-shape" in capsys.readouterr().err
    assert not (tmp_path / "out.pt").exists()
    assert main([*quick, "--model", "nets_of_mine.Net", "--input-shape", "3,16,16"]) == 0
    values = torch.load(tmp_path / "out.pt", weights_only=True)
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_the_checkpoint_is_never_overwritten(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = stored.read_bytes()
    assert main([str(stored), "--format", "state_dict", "--output", str(stored)]) == 1
    assert "is the checkpoint itself" in capsys.readouterr().err
    assert stored.read_bytes() == before
    assert main([str(stored.with_name("nothing.pt"))]) == 1
    assert "no such checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_has_a_name_of_its_own(kind: str, stored: Path) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
    assert main([str(stored), "--format", kind]) == 0
    assert morphtrain.load(stored) is not None  # still there
    assert len(list(stored.parent.glob("last.*"))) == (4 if kind == "state_dict" else 3)


@pytest.mark.parametrize(
    ("command", "typed", "line"),
    [
        (main, ["last.pt", "--format", "onxx"], "--format: invalid choice: 'onxx' (choose from "),
        (main, ["last.pt", "--formt=onnx"], "--formt=onnx: no such flag; did you mean --format?"),
        (main, ["last.pt", "format=onnx"], "format=onnx: no such flag; did you mean --format?"),
        (main, [], "the following arguments are required: checkpoint"),
        (sending.main, ["run", "--url", "x"], "--url: no such flag; did you mean --uri?"),
        (report.main, ["--outt", "x.html"], "--outt: no such flag; did you mean --out?"),
        (
            evidence.main,
            ["test", "runs", "--by", "arm", "--piared", "seed"],
            "--piared: no such flag; did you mean --paired",
        ),
        (evidence.main, ["tabel", "runs"], "table|test|fit: invalid choice: 'tabel' (choose from "),
        (evidence.main, ["test", "runs", "--by", "arm", "--margin", "x"], "--margin: invalid float value: 'x'"),
        (compare.parse, ["--", "--step", "3"], "--step: no such flag; did you mean --steps or "),
    ],
)
def test_a_mistyped_flag_is_answered_in_one_line(
    command: Callable[[list[str]], object], typed: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command(typed)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith(line) and said.count("\n") == 1
