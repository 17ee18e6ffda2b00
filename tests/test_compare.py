"""`python -m morphtrain.compare`: each side is what it would be alone, and what is said is what was measured."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import SMALL
from test_infobatch import DATA, numbered
from test_networks import narrower
from whole_runs import trained_to_the_end

import morphtrain
from morphtrain.compare import own_code, report, training
from morphtrain.compare.__main__ import parse
from morphtrain.compare.command import show
from morphtrain.compare.measure import WARMUP_STEPS, Measured, measure
from morphtrain.compare.own_state import OwnState
from morphtrain.compare.training import parts_of_epoch, steps
from morphtrain.compare.turns import in_turns
from morphtrain.errors import UserError
from morphtrain.evidence.interleaved import Turns, block_ratio
from morphtrain.method import Method
from morphtrain.state import Run
from morphtrain.trainer import begin_epoch, build_run, checkpoint, start, train_epoch
from morphtrain.trainer.train import new_run

CPU = torch.device("cpu")
DENSE = tuple(override for override in SMALL if not override.startswith("prune"))
PRUNED = SMALL[len(DENSE) :]
NOISY = "methods=[{_target_: test_compare.Noisy}]"
MEASURED = ("_seconds", "samples_per_second", "timestamp", "peak_memory_bytes")  # parts of names: of the machine


class Noisy(Method):
    """Draws from every source of random numbers, so that whoever else draws from them changes what is trained."""

    def after_step(self, run: Run) -> None:
        drawn = random.random() + np.random.rand() + torch.rand(()).item()
        with torch.no_grad():
            next(run.model.parameters()).add_(1e-2 * drawn)

    def measure(self, run: Run) -> dict[str, float]:
        return {"drawn": random.random() + np.random.rand() + torch.rand(()).item()}


def seed_everything() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def computed(records: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in record.items() if not any(part in k for part in MEASURED)} for record in records]


def alone(*overrides: str) -> list[dict[str, float]]:
    """The records of a run that has the process to itself."""
    seed_everything()
    return computed(trained_to_the_end(morphtrain.compose(*overrides)).history)


def test_each_side_computes_what_it_computes_alone() -> None:
    """Bit for bit, with pruning and with methods that draw; and each trains to its own end."""
    sides = (*SMALL, NOISY, "epochs=5"), (*DENSE, NOISY, "seed=2", "epochs=3")
    expected = [alone(*overrides) for overrides in sides]
    seed_everything()
    measured = measure([morphtrain.compose(*overrides) for overrides in sides])
    assert [computed(measured.records[name]) for name in "AB"] == expected
    assert len({record["drawn"] for record in expected[0]}) == 5
    assert expected[0][-1]["params"] < expected[0][0]["params"], "nothing was pruned"
    assert [len(measured.spent[name]) for name in "AB"] == [5, 3]
    assert (len(measured.turns.a), len(measured.turns.b), measured.warmup) == (4, 2, 1)
    epoch = measured.records["A"][2]
    assert measured.turns.a[1] == epoch["epoch_seconds"] + epoch["morph_seconds"]
    assert measured.turns.changed and measured.turns.parts == 2


class Noted(Method):
    """Notes after every step whose it was, by the seed of the run."""

    steps: ClassVar[list[int]] = []

    def after_step(self, run: Run) -> None:
        self.steps.append(run.config.seed)


def test_an_epoch_is_taken_in_turns_of_equal_parts() -> None:
    """32 and 44 steps in six turns of each, in blocks of two."""
    noted = (*DENSE, "batch_policy.batch_size=8", "epochs=3", "methods=[{_target_: test_compare.Noted}]")
    Noted.steps.clear()
    measured = measure([morphtrain.compose(*noted), morphtrain.compose(*noted, "seed=2", "data.train_samples=352")])
    assert (measured.turns.parts, len(measured.turns.a), len(measured.turns.b)) == (6, 2, 2)
    ends = {seed: {math.ceil(part * number / 6) for part in range(19)} for seed, number in ((1, 32), (2, 44))}
    done, turns, during = {1: 0, 2: 0}, [], set()
    for seed in Noted.steps:
        done[seed] += 1
        during.add(seed)
        if done[seed] in ends[seed]:
            assert during == {seed}
            turns.append(seed)
            during.clear()
    assert (done, len(turns)) == ({1: 96, 2: 132}, 36)
    assert {tuple(turns[n : n + 4]) for n in range(0, 36, 4)} <= {(1, 2, 2, 1), (2, 1, 1, 2)}


@pytest.mark.parametrize(
    "changing",
    [
        ("data.infobatch=0.6", "data.infobatch_until=0.9"),
        ("batch_policy=adabatch", "batch_policy.every=1", "batch_policy.factor=16", "batch_policy.max_batch_size=256"),
    ],
    ids=["fewer images", "fewer steps than turns"],
)
def test_parts_of_an_epoch_change_nothing_that_is_computed(changing: tuple[str, ...]) -> None:
    sides = (*DENSE, NOISY, "epochs=4", *changing), (*DENSE, NOISY, "epochs=4", "seed=2")
    expected = [alone(*overrides) for overrides in sides]
    seed_everything()
    measured = measure([morphtrain.compose(*overrides) for overrides in sides])
    assert measured.turns.parts == 2
    assert [computed(measured.records[name]) for name in "AB"] == expected
    assert min(one.seconds for name in "AB" for one in measured.spent[name]) > 0


@pytest.mark.parametrize(("steps", "parts"), [(1, 1), (9, 1), (10, 2), (19, 2), (40, 8), (390, 78)])
def test_an_epoch_has_whole_blocks_of_turns_of_five_steps_or_more(steps: int, parts: int) -> None:
    runs: list[Any] = [SimpleNamespace(data=numbered(number), batch_size=1) for number in (steps, 400)]
    assert parts_of_epoch(runs) == parts_of_epoch(runs[::-1]) == parts


@pytest.mark.parametrize(("kind", "parts"), [("tensors", 8), ("bytes", 8), ("files", 1)])
def test_data_that_are_read_ahead_are_in_whole_epochs(
    kind: str, parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "STEPS_OF_TURN", 1)
    in_memory, other = (SimpleNamespace(data=data, batch_size=1) for data in (numbered(8), DATA[kind](tmp_path)))
    runs: list[Any] = [in_memory, other]
    assert parts_of_epoch(runs) == parts


def weights_after_steps(beside: bool) -> torch.Tensor:
    seed_everything()
    runs, sides = {}, {}
    for name, seed in (("A", 1), ("B", 2)) if beside else (("A", 1),):
        state = OwnState(CPU)
        with state.own():
            runs[name] = build_run(morphtrain.compose(*SMALL, NOISY, f"seed={seed}"))
            start(runs[name])
        sides[name] = state.of(itertools.islice(steps(runs[name]), 20))
    assert [name for name, _ in in_turns(sides)].count("A") == 20
    return weights(runs["A"])


def weights(run: Run) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()])


def test_steps_in_turns_are_those_of_training_alone() -> None:
    expected = weights_after_steps(beside=False)
    assert torch.equal(weights_after_steps(beside=True), expected)
    seed_everything()
    run = build_run(morphtrain.compose(*SMALL, NOISY))
    start(run)
    for _ in range(2):  # 16 steps each: the 20 end in the second, whose learning rates an uncut epoch has, too
        begin_epoch(run)
        done = train_until(run, 20 - 16 * (run.epoch - 1))
    assert done == 4
    assert torch.equal(weights(run), expected)


def train_until(run: Run, most: int) -> int:
    """Train an epoch through its callback, which is told of every step, and stop it after `most`."""
    done = 0

    class Enough(Exception):
        pass

    def tick(images: int) -> None:
        nonlocal done
        done += 1
        if done == most:
            raise Enough

    with contextlib.suppress(Enough):
        train_epoch(run, tick)
    return done


def test_only_whole_batches_are_timed() -> None:
    run = build_run(morphtrain.compose(*SMALL, "batch_policy.batch_size=100", "epochs=2"))
    start(run)
    seen: list[int] = []
    run.model.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    assert len(list(steps(run))) == 4  # two epochs of 256 images
    assert seen == [100] * 4


@pytest.fixture
def structure(tmp_path: Path) -> Path:
    run = build_run(morphtrain.compose(*SMALL))
    narrower(run.graph)
    checkpoint.save(run, tmp_path, None)
    return tmp_path / "last.pt"


def test_a_checkpoints_structure_is_what_steps_train(structure: Path) -> None:
    dense, narrow = (new_run(morphtrain.compose(*SMALL, *more), CPU) for more in ((), (f"architecture={structure}",)))
    assert narrow.macs < 0.7 * dense.macs
    measured = measure([dense.config, narrow.config], number=6)
    assert (len(measured.spent["B"]), len(measured.turns.b)) == (6 + WARMUP_STEPS, 6)
    assert measured.turns.unit == "step"
    assert not measured.records["A"]


# -- the user's own code ---------------------------------------------------------------------------------------------

OWN = """
import random
from neighbour import CALLS
def setup(): CALLS.append("setup")
def epoch(): CALLS.append("epoch"); random.random()
def step(): CALLS.append("step")
def broken(): raise KeyError("weights")
def leaves(): raise SystemExit
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "neighbour.py").write_text("CALLS = []")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "neighbour", raising=False)
    return str(tmp_path / "mine.py")


def test_own_code_takes_the_turns_of_b(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone(*SMALL, NOISY, "epochs=3")
    seed_everything()
    measured = measure([morphtrain.compose(*SMALL, NOISY, "epochs=3")], vs=own)
    calls = sys.modules["neighbour"].CALLS
    assert calls == ["setup", *["epoch"] * 3]
    assert computed(measured.records["A"]) == expected
    assert len(measured.turns.a) == len(measured.turns.b) == 2 and measured.turns.parts == 1
    assert max(measured.turns.b) < min(measured.turns.a)
    measure([morphtrain.compose(*SMALL)], vs=own, number=2)
    assert calls[4:] == ["setup", *["step"] * (2 + WARMUP_STEPS)]
    monkeypatch.chdir(Path(own).parent)
    next(own_code.clocked("mine:step", "epoch", CPU))
    assert calls[-2:] == ["setup", "step"]


SETTING = """
import torch
SEEN = []
def setup():
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("medium")
    torch.autograd.set_detect_anomaly(True)
    torch.backends.mkldnn.enabled = False
def epoch():
    SEEN.append((torch.get_default_dtype(), torch.is_grad_enabled(), torch.backends.mkldnn.enabled))
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
"""


def test_what_own_code_sets_holds_for_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fixture of all tests sees that nothing is left of it either."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "setting.py").write_text(SETTING)
    expected = alone(*SMALL, NOISY, "epochs=3")
    seed_everything()
    measured = measure([morphtrain.compose(*SMALL, NOISY, "epochs=3")], vs=str(tmp_path / "setting.py"))
    assert computed(measured.records["A"]) == expected, "as if it were alone"
    seen = sys.modules["morphtrain.compare.own_code.setting"].SEEN
    assert seen == [(torch.float64, False, False)] * 3
    (tmp_path / "failing.py").write_text(f"{SETTING}def broken(): raise KeyError\n")
    with pytest.raises(UserError):
        measure([morphtrain.compose(*SMALL, "epochs=3")], vs=f"{tmp_path / 'failing.py'}:broken")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("{}:broken", r"--vs .*:broken: broken\(\) fails: KeyError: .*weights"),
        ("{}:leaves", r"leaves\(\) fails: SystemExit"),
        ("{}:nothing", "has no function nothing; with --steps it is step"),
        ("nowhere.py", "nowhere.py: no such file"),
        ("no_such_module", "importing it fails: No module named 'no_such_module'"),
    ],
)
def test_own_code_that_fails_is_one_line(target: str, message: str, own: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        next(own_code.clocked(target.format(own), "epoch", CPU))
    assert "\n" not in str(raised.value)


# -- the command -----------------------------------------------------------------------------------------------------


def test_options_may_stand_in_any_part() -> None:
    options, parts = parse(["--steps", "3", "a=1", "--", "b=1", "--seeds", "1,2", "c=1", "--", "--json", "x.json"])
    assert parts == [["a=1"], ["b=1", "c=1"], []]
    assert options == argparse.Namespace(steps=3, seeds=(1, 2), vs=None, json=Path("x.json"), config_dir=None)


MISTAKES = {
    "one config": (["seed=1"], "1 config with -- between them; A.. -- B.."),
    "four": (["--", "--", "--"], "4 configs with"),
    "own code and two configs": (["--", "--vs", "x.py"], "2 configs"),
    "a wrong option": (["prune.lasso_ratio=-1", "prune=prunetrain", "--"], "prune.lasso_ratio=-1"),
    "what has no effect": (["--", "tracking.uri=x"], "tracking.uri: has no effect on"),
    "resuming": (["--", "resume=auto"], "resume: has no effect"),
    "another device": (["device=cpu", "--", "device=auto"], "device: auto and cpu"),
    "other cores": (["timing.cores=1", "--"], "timing.cores: 1 and null"),
    "no steps": (["--", "--steps", "0"], "--steps=0: .* 1 or more"),
    "too many steps": ([*SMALL, "epochs=1", "--", "--", "--steps", "12"], "--steps 12: there are 16 whole batches"),
    "too few epochs": (["epochs=1", "--"], "epochs=1: .* more than timing.warmup_epochs=1"),
    "seeds twice": (["seed=3", "--", "--seeds", "1,2"], "--seeds 1,2: .* without another seed="),
    "equal seeds": (["--", "--seeds", "1,1"], "--seeds=1,1: .* different"),
    "no directory": (["--", "--json", "nowhere/x.json"], "--json=nowhere/x.json: .* a directory that exists"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake: str) -> None:
    arguments, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message) as raised:
        show(*parse(arguments))
    assert "\n" not in str(raised.value)


def command(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "morphtrain.compare", *arguments]
    env = {**os.environ, "TMPDIR": str(cwd.parent)}
    return subprocess.Popen(words, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_command_says_what_it_measured(tmp_path: Path) -> None:
    process = command(*DENSE, "epochs=5", "--", *PRUNED, "--", "--json", "pairs.json", cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.json"]
    content = json.loads((tmp_path / "pairs.json").read_text())
    (repeat,) = content["repeats"]
    kind = content["ratio_of"]  # CPU seconds, if other tests run meanwhile
    a, b = ([one[kind] for one in repeat["spent"][name][repeat["warmup"] :]] for name in "AB")
    found = block_ratio(a, b, pairs=1)
    assert (content["ratio"]["mean"], repeat["turns_of_epoch"]) == (found.mean, 2)
    assert "2 an epoch, on" in out
    assert f"B takes {found.mean:.3f} of the time that A takes for an epoch (95 % interval {found.low:.3f}" in out
    first, last = (repeat["records"][name][-1]["val_accuracy"] for name in "AB")
    assert f"B - A = {last - first:.4g}" in out
    assert "one seed, so no interval" in out
    totals = [repeat["records"][name][-1]["train_seconds"] for name in "AB"]
    assert f"{totals[1] / totals[0]:.4g}" in out
    assert [config["prune"]["name"] for config in repeat["configs"]] == ["prunetrain", "none"]
    assert repeat["machine"]["torch"] == torch.__version__
    assert "doubtful: only 4 pairs" in out


@pytest.mark.parametrize("foreign", [None, 0.0, 0.0999, 0.1001, 0.9])
@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("number", [1, 3])
def test_where_others_are_busy_the_answer_is_of_cpu_seconds(
    foreign: float | None, counted: bool, number: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """By the clock B takes twice as long, by CPU seconds 1.25 times; one busy repeat of several is enough."""
    machine = {"processor": "one", "threads": "1"}
    repeats: dict[int | None, Measured] = {}
    for seed in range(number):
        share = foreign if seed == number - 1 else 0.0
        clock, computed = (Turns([1.0] * 10, [b] * 10, "epoch", foreign_cpu=share) for b in (2.0, 1.25))
        repeats[seed] = Measured({}, 0, clock, computed if counted else None, {}, {}, machine)
    report.show({}, repeats)
    out = capsys.readouterr().out
    report.write(tmp_path / "x.json", {}, dict.fromkeys(repeats), repeats)
    content = json.loads((tmp_path / "x.json").read_text())
    busy = foreign is not None and foreign > 0.1 and counted
    kind, wanted = ("cpu_seconds", 1.25) if busy else ("seconds", 2.0)
    assert (content["ratio_of"], content["ratio"]["mean"]) == (kind, pytest.approx(wanted))
    assert f"B takes {wanted:.3f} of the time" in out
    assert ("what follows is of the CPU seconds" in out) == busy
    assert ("CPU seconds an epoch" in out) == counted


def test_seeds_are_pairs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ("--seeds", "1,2,3", "--json", f"{tmp_path}/x")
    show(*parse([*DENSE, "epochs=3", "--", "--", "model.width=4", *options]))
    out = capsys.readouterr().out
    repeats = json.loads((tmp_path / "x").read_text())["repeats"]
    assert [config["seed"] for repeat in repeats for config in repeat["configs"]] == [1, 1, 2, 2, 3, 3]
    gains = [r["records"]["B"][-1]["val_accuracy"] - r["records"]["A"][-1]["val_accuracy"] for r in repeats]
    assert f"B - A = {np.mean(gains):.4g} [" in out
    spent = [[[one["seconds"] for one in r["spent"][name][1:]] for name in "AB"] for r in repeats]
    logs = [np.mean(np.log(np.divide(b, a))) for a, b in spent]
    assert f"{np.exp(np.mean(logs)):.4g} [" in out
    assert out.count("3 seeds") >= 3


def test_a_signal_ends_it_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from pathlib import Path\ndef epoch(): Path('begun').touch()\n")
    process = command(*DENSE, "epochs=9999", "--vs", "mine.py", "--json", "x.json", cwd=tmp_path)
    end = time.monotonic() + 60
    while not (tmp_path / "begun").exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (128 + signal.SIGTERM, "", "")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["begun", "mine.py"]


def test_help_is_fast_because_it_imports_little(tmp_path: Path) -> None:
    look = (
        "import sys; sys.argv[1:] = ['--help']\n"
        "try: from morphtrain.compare.__main__ import main; main()\n"
        "except SystemExit: print(sorted({'torch', 'hydra', 'numpy', 'mlflow', 'rich'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("[]\n")
    assert "A.. -- B.." in result.stdout
