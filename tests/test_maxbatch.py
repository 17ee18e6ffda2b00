"""The command `morphtrain.maxbatch`: what it prints, what it accepts, and what it says about mistakes."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from test_errors import check_failure

from morphtrain import schema
from morphtrain.byte_sizes import byte_count, readable
from morphtrain.cost import estimate_memory
from morphtrain.cost.verify import _in_fresh_process
from morphtrain.errors import UserError
from morphtrain.model import ResNet
from morphtrain.schema import CONF
from morphtrain.trainer.max_batch_report import images_of, pick_possible_device, show_max_batch

MY_NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes, in_channels, width=4):
        super().__init__(nn.Conv2d(in_channels, width, 3), nn.Flatten(), nn.Linear(width * 30 * 30, num_classes))
"""


def parsed(*overrides: str) -> schema.MaxBatch:
    with initialize_config_dir(str(CONF)):
        return schema.parse_max_batch(compose("maxbatch", overrides=list(overrides)))


def maxbatch(*overrides: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "morphtrain.maxbatch", *overrides]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True)


def test_the_command_answers_and_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "my_nets.py").write_text(MY_NET)
    network = ["model=custom", "model._target_=my_nets.Net", "+model.width=6", "data=cifar10"]
    result = maxbatch(*network, "budget=50MiB", "throughput_seconds=0.5", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    said = result.stdout
    assert said.startswith("model=custom norm=batch optimizer=sgd precision=o0 device=")
    fixed, per_sample = map(int, re.search(r"\((\d+) \+ (\d+) \* batch bytes\)", said).groups())
    batch_size = int(re.search(r"largest batch: (\d+)", said)[1])
    assert batch_size == (50 * 2**20 - fixed) // per_sample
    assert "not modelled: workspaces" in said
    rates = dict(re.findall(r"(\d+): ([\d.e+]+)", said.split("samples a second by batch:")[1]))
    knee = int(re.search(r"within 5 % of the fastest: (\d+)", said)[1])
    best = max(map(float, rates.values()))
    assert float(rates[str(knee)]) >= 0.95 * best
    assert {path.name for path in tmp_path.iterdir()} <= {"my_nets.py", "__pycache__"}


def test_the_answer_is_the_librarys(capsys: pytest.CaptureFixture[str]) -> None:
    config = parsed("model=resnet8", "data=cifar10", "budget=256MiB", "overhead=20%", "throughput_seconds=0")
    found = show_max_batch(config, ["model=resnet8"])
    budget = 0.8 * 256 * 2**20
    model = ResNet(blocks=1)  # SGD with momentum is the default of both
    assert estimate_memory(model, (3, 32, 32), found) <= budget < estimate_memory(model, (3, 32, 32), found + 1)
    said = capsys.readouterr().out
    assert f"largest batch: {found};" in said
    assert "204.8 MiB for tensors" in said
    assert "samples a second" not in said


NETWORKS = {
    "vgg11": [],
    "mobilenet_v1": ["precision=bf16"],
    "alexnet": ["optimizer=adamw", "model.stem=imagenet", "input_shape=[3,64,64]"],
    "torchvision": ["model.name=squeezenet1_1"],
}
MORE = {
    **{name: [] for name in ("resnet20", "resnet56", "vgg8", "vgg16", "mobilenet_v2")},
    "resnet50": ["input_shape=[3,64,64]"],
    "torchvision ": ["model.name=densenet121"],
    "torchvision  ": ["model.name=efficientnet_b0", "input_shape=[3,64,64]"],
    "torchvision   ": ["model.name=vit_b_16", "input_shape=[3,64,64]", "+model.options.image_size=64"],
}


@pytest.mark.parametrize("name", [*NETWORKS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_every_kind_of_network_has_an_answer(name: str) -> None:
    overrides = [f"model={name.strip()}", "data=cifar10", *(NETWORKS | MORE)[name], "device=cpu"]
    config = parsed(*overrides, "budget=11GiB", "throughput_seconds=0")
    assert 100 < show_max_batch(config, []) < 10**6


def test_a_device_that_is_not_here_is_estimated_only(capsys: pytest.CaptureFixture[str]) -> None:
    found = torch.accelerator.current_accelerator(check_available=True)
    absent = "mps" if found is None or found.type != "mps" else "cuda"
    assert pick_possible_device(absent) == (torch.device(absent), False)
    assert pick_possible_device("cpu") == (torch.device("cpu"), True)
    assert show_max_batch(parsed("budget=1GiB", f"device={absent}"), []) > 100
    assert f"speed not measured: no {absent} here" in capsys.readouterr().out


@pytest.mark.parametrize("overrides", [["data=digits"], ["data=mnist_5000"], ["data=synthetic", "data.in_channels=2"]])
def test_the_known_shape_is_that_of_the_data(overrides: list[str]) -> None:
    config = parsed(*overrides, "budget=1GiB")
    data = importlib.import_module(f"morphtrain.data.{config.data.name}").build(config.data)
    assert images_of(config) == (tuple(data.input_shape), data.num_classes)


def test_keys_take_precedence_over_the_data() -> None:
    assert images_of(parsed("data=cifar100", "budget=1")) == ((3, 32, 32), 100)
    assert images_of(parsed("data=fashion_mnist", "budget=1")) == ((1, 28, 28), 10)
    assert images_of(parsed("data=cifar100", "num_classes=7", "budget=1")) == ((3, 32, 32), 7)
    assert images_of(parsed("data=image_folder", "num_classes=7", "budget=1")) == ((3, 224, 224), 7)
    assert images_of(parsed("input_shape=[4,9,5]", "budget=1")) == ((4, 9, 5), 10)


WRONG = {
    "no budget": ([], "budget: missing; give it a value"),
    "no size": (["budget=much"], "budget=much: must be a size such as 11GiB"),
    "no unit": (["budget=11GiG"], "budget=11GiG: must be a size"),
    "no number": (["budget=1.2.3GiB"], "budget=1.2.3GiB: must be a size"),
    "nothing": (["budget=0"], "budget=0: must be above 0"),
    "all of it": (["budget=1GiB", "overhead=100%"], "overhead=100%: must be less than budget=1GiB"),
    "more than it": (["budget=1GiB", "overhead=2GiB"], "overhead=2GiB: must be less than budget=1GiB"),
    "shape": (["budget=1", "input_shape=[3,0]"], r"input_shape=\[3, 0\]: must be numbers of 1 or more"),
    "classes": (["budget=1", "num_classes=1"], "num_classes=1: must be 2 or more"),
    "seconds": (["budget=1", "throughput_seconds=-1"], "throughput_seconds=-1.0: must be 0 or more"),
    "device": (["budget=1", "device=tpu"], "device=tpu: must be auto, cpu"),
    "key": (["budget=1", "+epochs=3"], "epochs=3: no such key; there are budget, overhead"),
    "model's key": (["budget=1", "model.width=0"], "model.width=0: must be 1 or more"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_key_is_named(case: str) -> None:
    overrides, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        parsed(*overrides)


UNANSWERABLE = {
    "too small": (["budget=1MiB"], r"budget=1MiB: nothing fits 1048576 bytes: a step of one sample takes \d{7}"),
    "unknown classes": (["budget=1GiB", "data=image_folder"], "num_classes=null: not known for data=image_folder"),
    "images": (["budget=1GiB", "model=alexnet", "model.stem=imagenet"], r"model=alexnet: cannot take .*\(1, 16, 16\)"),
}


@pytest.mark.parametrize("case", UNANSWERABLE)
def test_what_has_no_answer_is_named(case: str) -> None:
    overrides, message = UNANSWERABLE[case]
    with pytest.raises(UserError, match=message):
        show_max_batch(parsed(*overrides), [])


def test_a_mistake_is_a_message_without_a_traceback(tmp_path: Path) -> None:
    check_failure(maxbatch("budget=much", cwd=tmp_path), ["budget=much", "11GiB"])
    check_failure(maxbatch("budgt=1MiB", cwd=tmp_path), ["budgt"])
    assert not list(tmp_path.iterdir())


def test_help_and_config_do_without_torch(tmp_path: Path) -> None:
    for flag in (["--help"], ["--cfg", "job"]):
        result = maxbatch(*flag, cwd=tmp_path, env={"PYTHONPROFILEIMPORTTIME": "1"})
        assert result.returncode == 0
        assert "throughput_seconds" in result.stdout
        imported = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines() if "|" in line}
        assert "hydra" in imported
        assert not imported & {"torch", "mlflow", "numpy"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="makes a trial fail by there being no CUDA device")
def test_a_trial_that_fails_for_anything_but_memory_is_an_error() -> None:
    model = ResNet(blocks=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="trial of 2 samples ended with exit code 1"):
        _in_fresh_process(2, 1e9, model, optimizer, (3, 32, 32), None, torch.device("cuda"))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *(("11GiB", 11 * 2**30), ("512MiB", 2**29), ("8e9", 8e9), ("2.5GB", 2.5e9), ("64 kB", 64000)),
        *((1024, 1024), ("1e-3TB", 10**9)),
    ],
)
def test_sizes_are_read(text: object, size: float) -> None:
    assert byte_count("budget", text) == size


@given(st.integers(0, 10**15))
def test_sizes_are_written_as_they_are_read(size: int) -> None:
    assert byte_count("budget", readable(size)) == pytest.approx(size, rel=1e-3)


@pytest.mark.parametrize("value", ["-1", "", "GiB", "nan", "inf", True])
def test_what_is_no_size_is_refused(value: object) -> None:
    with pytest.raises(UserError, match="must be a size"):
        byte_count("budget", value)
