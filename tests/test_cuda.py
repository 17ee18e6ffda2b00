"""On a GPU: what the other tests show of every option on a CPU, and what only a GPU can show.

    python -m pytest -m gpu tests/test_cuda.py

Two processes that train there compute the same bits only with torch's deterministic algorithms, which the fixture
`deterministic` asks for; a run uses the fastest.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import SMALL, Answer
from covering import Row
from test_compare import DENSE
from test_pairs import ROWS, advance, check, config_of, title
from test_slots import holder, timing

import morphtrain
from morphtrain import schema
from morphtrain.batch_policy.fill_memory import memory_of, usable_bytes
from morphtrain.compare.__main__ import parse
from morphtrain.compare.command import show
from morphtrain.errors import UserError
from morphtrain.export import FORMATS
from morphtrain.export import __main__ as export
from morphtrain.model import ResNet
from morphtrain.morph import ChannelGraph
from morphtrain.state import Run
from morphtrain.timing.claims import Claims
from morphtrain.timing.contention import Guard
from morphtrain.timing.slot import take_slot
from morphtrain.trainer import begin_epoch, build_run, checkpoint, finish_epoch, start, train, train_epoch
from morphtrain.trainer.devices import possible_devices
from morphtrain.trainer.loop import training_steps

pytestmark = pytest.mark.gpu

SHAPE = (3, 8, 8)  # of an image of SMALL


def config(*overrides: str, base: tuple[str, ...] = DENSE, device: str = "cuda") -> schema.Config:
    own = {override.split("=")[0] for override in overrides}
    kept = [override for override in base if override.split("=")[0] not in own]
    return morphtrain.compose(*kept, "tracking=none", f"device={device}", *overrides)


def started(chosen: schema.Config) -> Run:
    run = build_run(chosen)
    start(run)
    return run


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of 32 bits, of which convolutions on recent cards keep 19 by default (TF32)."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


# -- every option ----------------------------------------------------------------------------------------------------


def on_gpu(row: Row) -> schema.Config:
    """The run of a row; what is `auto` on a CPU, bfloat16, has it here too: rows of their own are of float16."""
    found = replace(config_of(row), device="cuda")
    if getattr(found.precision, "dtype", None) == "auto":
        found = replace(found, precision=replace(found.precision, dtype="bfloat16"))
    return found


@pytest.mark.parametrize("row", ROWS, ids=[f"{number:02}" for number in range(len(ROWS))])
def test_options_go_together_and_resume_to_the_same_bits(row: Row, tmp_path: Path, deterministic: None) -> None:
    print(title(row))
    check(on_gpu(row), tmp_path)


@pytest.mark.parametrize("row", ROWS[::4], ids=[f"{number:02}" for number in range(0, len(ROWS), 4)])
@pytest.mark.parametrize("devices", [("cuda", "cpu"), ("cpu", "cuda")], ids="-".join)
def test_a_checkpoint_goes_on_on_another_device(row: Row, devices: tuple[str, str], tmp_path: Path) -> None:
    print(title(row))
    here, there = (replace(on_gpu(row), device=device) for device in devices)
    run = started(here)
    advance(run)
    checkpoint.save(run, tmp_path, None)
    if here.precision.name == "auto" and run.chosen["precision"] == "o1":
        pytest.skip("a CPU does not choose float16")
    resumed = checkpoint.Checkpoint(tmp_path / checkpoint.LAST).restore(there)
    start(resumed)
    for each in (run, resumed):
        advance(each)
    assert resumed.device.type == devices[1]
    places = {t.device.type for t in (*resumed.model.parameters(), *resumed.model.buffers())}
    state = [t for s in resumed.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor) and t.dim()]
    assert places | {t.device.type for t in state} == {devices[1]}
    assert math.isfinite(resumed.train_loss)


STEPS = 2  # of a network that has not learnt yet, in which differences of rounding soon grow
COMPUTED = {
    "sgd": (),
    "prunetrain": ("prune=prunetrain", "prune.start_epoch=1", "prune.lasso_ratio=3"),
    "subgradient": ("prune=prunetrain", "prune.start_epoch=1", "prune.update=subgradient"),
    "morphnet": ("prune=morphnet", "prune.start_epoch=1", "prune.regulariser=group_lasso"),
    "taylor": ("prune=early", "prune.importance=taylor", "prune.round_to=1"),
    "ghost": ("norm=ghost", "norm.ghost_batch_size=6"),
    "weight norm": ("norm=weight", "clip_norm=1"),
    "lars": ("optimizer=lars",),
    "adamw": ("optimizer=adamw",),
    "fused": ("optimizer.fused=true",),
    "top1": ("gradient=approximate", "gradient.kind=top1", "gradient.share=1"),
    "zero": ("gradient=approximate", "gradient.kind=zero", "gradient.share=1"),
    "dfp16": ("precision=dfp16",),
    "passes": ("batch_policy.max_micro_batch=5", "clip_norm=1"),
    "channels_last": ("memory_format=channels_last",),
    "small images": ("data.progressive=0.5",),
    "augmented": ("data=digits", "data.shift=2"),
}


@pytest.mark.parametrize("case", COMPUTED)
def test_steps_go_where_those_on_a_cpu_go(case: str, exact: None) -> None:
    """Up to rounding: the same images in the same order, and the same gradients, penalties and steps."""
    base = tuple(o for o in DENSE if not (case == "augmented" and o.startswith("data")))
    moved = []
    for device in ("cpu", "cuda"):
        run = started(config(*COMPUTED[case], base=base, device=device))
        begin_epoch(run)
        before = weights(run)
        for _ in itertools.islice(training_steps(run), STEPS):
            pass
        moved.append(weights(run) - before)
    on_cpu, on_cuda = moved
    assert (on_cuda - on_cpu).norm() < 0.05 * on_cpu.norm()


def weights(run: Run) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().cpu() for parameter in run.model.parameters()])


def test_a_widened_network_computes_the_same_there(exact: None) -> None:
    model = ResNet(blocks=1, width=8).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images = torch.randn(4, *SHAPE, device="cuda")
    model(images).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    graph = ChannelGraph.trace(model, torch.zeros(1, *SHAPE))
    before = model.eval()(images)
    for space in graph.spaces:
        graph.reindex(space, [*range(space.size), *range(space.size)], optimizer)
    torch.testing.assert_close(model(images), before, atol=1e-5, rtol=1e-4)
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    assert state and all(t.is_cuda for t in (*model.parameters(), *model.buffers(), *state))


# -- formats and compiling -------------------------------------------------------------------------------------------

TYPES = {  # what convolutions compute in there
    "o0": torch.float32,
    "o1": torch.float16,
    "o2": torch.float16,
    "o3": torch.float16,
    "bf16": torch.bfloat16,
    "bf16_pure": torch.bfloat16,
    "dfp16": torch.float32,
}


@pytest.mark.parametrize("name", TYPES)
def test_each_format_learns_in_its_type(name: str, tmp_path: Path) -> None:
    run = started(config(f"precision={name}", "epochs=4", "optimizer.lr=0.03"))
    computed: set[torch.dtype] = set()
    stem = next(m for m in run.model.modules() if isinstance(m, torch.nn.Conv2d))
    handle = stem.register_forward_hook(lambda module, args, output: computed.add(output.dtype))
    begin_epoch(run)
    train_epoch(run)
    handle.remove()
    finish_epoch(run)
    for _ in range(3):
        advance(run)
    assert computed == {TYPES[name]}
    assert run.history[-1]["val_loss"] < run.history[0]["val_loss"]
    assert run.history[-1]["val_accuracy"] > 0.5
    if name in ("o1", "o2"):
        assert run.history[-1]["loss_scale"] > 1


def test_float16_skips_a_step_that_overflows(tmp_path: Path) -> None:
    run = started(config("precision=o1", "precision.init_scale=1e30"))
    advance(run)
    assert run.history[-1]["skipped_steps"] > 0
    assert run.history[-1]["loss_scale"] < 1e30
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())


def test_auto_chooses_for_the_card(tmp_path: Path) -> None:
    train(config("precision=auto", "memory_format=auto", "epochs=1"), tmp_path, {})
    chosen = json.loads((tmp_path / "environment.json").read_text())
    assert chosen["precision"] in ("o0", "bf16", "o1")
    assert chosen["memory_format"] in ("contiguous", "channels_last")


def test_compiled_steps_compute_the_same(exact: None) -> None:
    ends = []
    with patch.dict(os.environ):  # where the compiler notes its directories
        for compiled in ("none", "default"):
            run = started(config(f"compile={compiled}", "data.train_samples=512", "epochs=2", "optimizer.lr=0.01"))
            advance(run)
            ends.append(weights(run))
    assert run.history[-1]["compile_seconds"] > 0
    assert (ends[0] - ends[1]).norm() < 0.01 * ends[0].norm()


# -- memory ----------------------------------------------------------------------------------------------------------

WIDE = ("model.width=32", "data.image_size=32", "batch_policy.batch_size=128", "data.train_samples=1280")
LARGE = ("model.width=64", "data.image_size=64", "batch_policy.batch_size=1024", "data.train_samples=1024")


WORKSPACES = 300 * 2**20  # what kernels take that the memory model does not count, at the most


def test_peaks_are_those_of_the_memory_model_and_workspaces() -> None:
    run = started(config(*WIDE))
    before = torch.cuda.memory_allocated()
    advance(run)
    step = memory_of(run).peak(128)
    weights_held = sum(t.numel() * t.element_size() for t in (*run.model.parameters(), *run.model.buffers()))
    measured = run.history[-1]["peak_memory_bytes"] - before + weights_held
    print(f"estimated {step}, measured {measured}")
    assert 0 < measured - step < WORKSPACES


def test_what_is_free_is_the_budget_and_batches_grow() -> None:
    run = started(config("batch_policy=fill_memory", "batch_policy.batch_size=16", "prune=early", "prune.round_to=1"))
    free, total = torch.cuda.mem_get_info(run.device)
    budget = usable_bytes(replace(run.config.batch_policy, overhead=0), run.device)
    assert 0.5 * free < budget <= total
    advance(run)
    assert run.params < run.initial["params"]
    assert run.batch_size == 24  # a tenth of the images allows that, not the memory


def test_a_batch_that_does_not_fit_goes_in_passes_that_do() -> None:
    whole = memory_of(started(config(*WIDE))).peak(128)
    budget = whole // 2
    run = started(config(*WIDE, "batch_policy=fill_memory", "batch_policy.overhead=0", f"batch_policy.budget={budget}"))
    assert run.micro_batch is not None and run.micro_batch < 128
    before = torch.cuda.memory_allocated()
    advance(run)
    assert run.history[-1]["peak_memory_bytes"] - before < budget + WORKSPACES < whole + WORKSPACES


def test_memory_that_runs_out_is_one_line_that_names_the_keys(tmp_path: Path) -> None:
    torch.cuda.set_per_process_memory_fraction(0.01)
    try:
        with pytest.raises(UserError, match=r"batch_policy\.batch_size=1024 .*out of memory, .*iB could not be had"):
            train(
                config(
                    "data.image_size=64", "data.train_samples=1024", "batch_policy.batch_size=1024", "model.width=64"
                ),
                tmp_path,
                {},
            )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    (tmp_path / "after").mkdir()
    train(config("epochs=1"), tmp_path / "after", {})


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["o1", "o3"])
def test_the_largest_batch_is_tried_on_the_card(precision: str, tmp_path: Path) -> None:
    words = ["model=resnet8", "model.width=64", "data=cifar10", "budget=1GiB", "throughput_seconds=1", "device=cuda"]
    command = [sys.executable, "-m", "morphtrain.maxbatch", *words, f"precision={precision}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    estimated = int(re.search(r"largest batch: (\d+)", done.stdout)[1])
    verified = int(re.search(r"verified: (\d+), by two steps in each of (\d+) fresh processes", done.stdout)[1])
    assert 0.7 * estimated < verified <= estimated  # workspaces take the rest
    assert "the smallest batch within 5 % of the fastest" in done.stdout


# -- the clock, the claims, the files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sync", ["edges", "each", "none"])
def test_runs_are_clocked_in_every_mode(sync: str, tmp_path: Path) -> None:
    train(config(f"timing.sync={sync}", "epochs=2"), tmp_path, {})
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert len(records) == 2
    for record in records:
        assert record["epoch_seconds"] > 0 and record["peak_memory_bytes"] > 0
        assert record["calibrated_seconds"] > 0 and record["reference_seconds"] > 0
        assert "foreign_cpu" not in record


# Four steps that take a card longer than they take to ask for.
BUSY = ("model.width=256", "data.image_size=32", "batch_policy.batch_size=256", "data.train_samples=1024", "epochs=2")


def test_never_waiting_leaves_out_what_the_card_has_not_done() -> None:
    """`timing.sync=none` shows what goes wrong: steps are asked for faster than they are done."""
    seconds = {}
    for sync in ("edges", "none"):
        run = started(config(f"timing.sync={sync}", *BUSY))
        for _ in range(2):
            advance(run)
        seconds[sync] = run.history[-1]["epoch_seconds"]
    print(seconds)
    assert seconds["none"] < 0.7 * seconds["edges"]


def test_the_environment_names_the_card(tmp_path: Path) -> None:
    train(config("epochs=1"), tmp_path, {})
    facts = json.loads((tmp_path / "environment.json").read_text())
    assert facts["processor"] == torch.cuda.get_device_name()
    assert facts["device"] == "cuda:0"


def test_a_run_sees_another_on_its_card(tmp_path: Path) -> None:
    claims, devices = Claims(tmp_path), possible_devices("cuda")[:1]
    with take_slot(devices, timing(), claims) as slot:
        guard = Guard(slot, timing(), [])
        guard.epoch_begins()
        epoch = {"epoch": 1.0, "setup_seconds": 0.0, "epoch_seconds": 1.0, "morph_seconds": 0.0}
        assert guard.judged(epoch, [])["contended"] == 0
        (name,) = slot.claim.resources
        assert name == f"cuda {torch.cuda.get_device_properties(0).uuid}"
        process = holder(tmp_path, name)
        assert guard.judged(epoch, [])["contended"] == 1
        with (
            pytest.raises(UserError, match=f"timing.when_busy=refuse: {name}: in use by process") as refused,
            take_slot(devices, timing(when_busy="refuse"), claims),
        ):
            pass
        assert {str(process.pid), str(os.getpid())} <= set(re.findall(r"\d+", str(refused.value)))
        process.communicate()


def test_a_card_that_is_not_there_is_one_line(answer: Answer) -> None:
    said = answer("device=cuda:99", "tracking=none")
    assert "device=cuda:99: not on this machine; there are auto, cpu, cuda, cuda:0" in said


@pytest.mark.parametrize("kind", FORMATS)
def test_a_network_trained_there_is_exported(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    train(config(base=SMALL), tmp_path, {})
    assert export.main([str(tmp_path / "last.pt"), "--format", kind, "--output", str(tmp_path / "net")]) == 0
    assert "differs from the network by at most" in capsys.readouterr().out
    assert all(not parameter.is_cuda for parameter in morphtrain.load(tmp_path / "last.pt").parameters())


def test_times_of_layers_are_the_cards(tmp_path: Path) -> None:
    run = started(config("prune=early", "prune.cost=latency", "prune.target=0.9", "prune.round_to=1"))
    advance(run)
    assert run.params < run.initial["params"]


# -- comparisons -----------------------------------------------------------------------------------------------------


def test_two_configs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = (*DENSE, "device=cuda", "model.width=32", "epochs=3")
    show(*parse([*common, "--", "--", "precision=bf16", "--steps", "20", "--json", str(tmp_path / "x.json")]))
    assert "B takes" in capsys.readouterr().out
    (repeat,) = json.loads((tmp_path / "x.json").read_text())["repeats"]
    assert repeat["machine"]["processor"] == torch.cuda.get_device_name()


@pytest.mark.parametrize("drawn", ["precision=dfp16 precision.rounding=stochastic", "gradient=sparse_activation"])
def test_each_side_draws_as_it_does_alone(drawn: str, tmp_path: Path, deterministic: None) -> None:
    """The numbers that a card draws are each side's own, too."""
    words = (*DENSE, "device=cuda", "epochs=2", *drawn.split())
    ends = []
    for other in ((*words, "seed=2"), (*words, "seed=3", "model.width=4")):
        show(*parse([*words, "--", "--", *other[len(words) :], "--json", str(tmp_path / "x.json")]))
        (repeat,) = json.loads((tmp_path / "x.json").read_text())["repeats"]
        ends.append([(record["train_loss"], record["val_loss"]) for record in repeat["records"]["A"]])
    assert ends[0] == ends[1]


def test_two_processes_compute_the_same_bits(tmp_path: Path) -> None:
    """With torch's deterministic algorithms."""
    (tmp_path / "run_exactly.py").write_text(
        "import torch\nfrom morphtrain.run import main\ntorch.use_deterministic_algorithms(True)\nmain()\n"
    )
    env = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}

    def run(directory: str, *overrides: str) -> None:
        words = [*SMALL, "tracking=none", "device=cuda", f"hydra.run.dir={directory}", *overrides]
        command = [sys.executable, "run_exactly.py", *words]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    run("once")
    run("twice")
    losses = [
        [json.loads(line)["train_loss"] for line in (tmp_path / name / "records.jsonl").read_text().splitlines()]
        for name in ("once", "twice")
    ]
    assert losses[0] == losses[1]
    ends = [torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("once", "twice")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
