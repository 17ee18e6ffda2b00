"""What an ONNX file says about a network: the names of its modules, its inputs and outputs, and where it comes from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL
from test_networks import CASES, Net, narrower, pruned
from torch import nn

import morphtrain
from morphtrain.export.__main__ import main
from morphtrain.export.onnx import OPSET
from morphtrain.export.write import export
from morphtrain.preprocessing import Preprocessing
from morphtrain.trainer import checkpoint
from morphtrain.trainer.build import build_run

onnx, onnxruntime = (pytest.importorskip(name) for name in ("onnx", "onnxruntime"))

SAID = Preprocessing([0.5] * 3, [0.2] * 3, 1, None, (3, 16, 16), 10, list("abcdefghij"))
SLOWER = ("mobilenet", "ghost", "without blocks")
OF_LAYER = {"Conv": nn.Conv2d, "Gemm": nn.Linear, "BatchNormalization": nn.modules.batchnorm._BatchNorm}


def exported(network: nn.Module, path: Path, said: Preprocessing = SAID, **options: Any) -> Any:
    export(network, path, "onnx", said, **options)
    return onnx.load(path)


def properties(model: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c in SLOWER)) for c in CASES])
def test_names_are_those_of_the_modules_as_they_are_now(case: str, tmp_path: Path) -> None:
    network = pruned(case).eval()
    model = exported(network, tmp_path / "net.onnx")
    onnx.checker.check_model(model, full_check=True)
    modules, values = dict(network.named_modules()), network.state_dict()
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        path, _, operation = node.name.partition("/")
        if node.op_type in OF_LAYER:
            assert isinstance(modules[node.name], OF_LAYER[node.op_type]), node.name
            assert node.input[1] == f"{node.name}.weight"
        elif operation:
            assert path in modules and operation.startswith(node.op_type), node.name
        else:
            assert node.name in modules or node.name.startswith(node.op_type), node.name
    convolutions = {name for name, module in modules.items() if type(module) is nn.Conv2d}
    assert convolutions == {node.name for node in model.graph.node if node.op_type == "Conv"}
    for name in convolutions:  # batch norms may be folded into their values
        assert stored[f"{name}.weight"].shape == tuple(values[f"{name}.weight"].shape)
    assert torch.equal(torch.from_numpy(stored["classifier.weight"].copy()), values["classifier.weight"])


@pytest.mark.parametrize("case", ["gated", "own"])
def test_no_two_things_have_one_name(case: str, tmp_path: Path) -> None:
    graph = exported(pruned(case), tmp_path / "net.onnx").graph
    nodes = [node.name for node in graph.node]
    made = [name for node in graph.node for name in node.output if name]
    given = [*(tensor.name for tensor in graph.initializer), *(value.name for value in graph.input)]
    assert all(nodes) and len(set(nodes)) == len(nodes)
    assert len({*made, *given}) == len(made) + len(given)
    assert all(name == node.name or name == "logits" for node in graph.node for name in node.output[:1])


class Awkward(nn.Module):
    """A layer that is called like the output, one that is used twice, and operations of the network itself."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Conv2d(3, 3, 3, padding=1)
        self.twice = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.twice(self.logits(self.twice(x))) + 1).mean((2, 3))


def test_names_that_are_taken_are_numbered(tmp_path: Path) -> None:
    network = Awkward().eval()
    model = exported(network, tmp_path / "net.onnx", Preprocessing(input_shape=(3, 8, 8)))
    (convolution,) = [node for node in model.graph.node if node.op_type == "Conv"]
    assert convolution.name.startswith("logits") and convolution.output[0] != "logits"
    assert sum(node.name.startswith("twice") for node in model.graph.node) == 2
    assert model.graph.output[0].name == "logits"
    x = torch.randn(2, 3, 8, 8)
    found = onnxruntime.InferenceSession(tmp_path / "net.onnx").run(None, {"images": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), network(x), rtol=1e-4, atol=1e-5)


def test_a_file_says_what_it_is(tmp_path: Path) -> None:
    network = Net()
    model = exported(network, tmp_path / "net.onnx", run={"run.seed": "3"})
    assert (model.producer_name, model.producer_version) == ("morphtrain", morphtrain.__version__)
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == OPSET
    assert model.graph.name == "Net"
    found = properties(model)
    assert found["network"] == "Net" and found["run.seed"] == "3"
    assert found["parameters"] == str(sum(p.numel() for p in network.parameters()))
    read = {name: json.loads(found[name]) for name in ("mean", "std", "max_pixel", "input_shape", "classes")}
    assert Preprocessing(**read, num_classes=json.loads(found["num_classes"])) == SAID
    assert "resize" not in found, "it is not known"
    (given,), (made,) = model.graph.input, model.graph.output
    assert "(pixels - mean) / std, mean 0.5, 0.5, 0.5, std 0.2, 0.2, 0.2" in given.doc_string
    assert made.doc_string.endswith("a, b, c, d, e, f, g, h, i, j.")
    assert given.doc_string in model.doc_string


def test_a_file_of_a_run_names_the_run_and_no_place_on_the_machine(tmp_path: Path) -> None:
    run = build_run(morphtrain.compose(*SMALL, "seed=5"))
    narrower(run.graph)
    run.epoch, run.history = 2, [{"epoch": 2, "val_accuracy": 0.75}]
    checkpoint.save(run, tmp_path, "abc123")
    assert main([str(tmp_path / "last.pt")]) == 0
    found = properties(onnx.load(tmp_path / "last.onnx"))
    of_run = {name.removeprefix("run."): value for name, value in found.items() if name.startswith("run.")}
    assert of_run.pop("model")
    assert of_run == {"data": "synthetic", "seed": "5", "epoch": "2", "val_accuracy": "0.75", "id": "abc123"}
    content = (tmp_path / "last.onnx").read_bytes()
    assert str(tmp_path).encode() not in content and str(Path(morphtrain.__file__).parent).encode() not in content
    assert not re.search(rb'File "', content)


def test_a_network_alone_names_no_run(tmp_path: Path) -> None:
    run = build_run(morphtrain.compose(*SMALL))
    checkpoint.save(run, tmp_path, None)
    morphtrain.save(morphtrain.load(tmp_path / "last.pt"), tmp_path / "net.pt")
    assert main([str(tmp_path / "net.pt")]) == 0
    assert not [name for name in properties(onnx.load(tmp_path / "net.onnx")) if name.startswith("run.")]
