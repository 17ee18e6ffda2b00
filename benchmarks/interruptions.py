"""Runs and sweeps that are signalled and killed, at random and at aimed moments: how many end as they should.

python benchmarks/interruptions.py --signals 300 --kills 80

A signal has to end what it hits within two seconds, with exit code 130 or 143, the MLflow run KILLED, no database
locked, and no traceback. A chain of kills and resumes has to end with the bits of a run that nobody has killed.
Four of five signals go to `train` in one process, where they come by the hundred; the others to commands.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path.insert(0, str(TESTS))

LIMIT = 2.0  # seconds between a signal and the end
SMALL = (
    *("data=synthetic", "data.train_samples=256", "data.val_samples=64", "data.image_size=8", "device=cpu"),
    *("model.width=8", "model.blocks=2", "batch_policy.batch_size=16"),
    *("prune=prunetrain", "prune.lasso_ratio=0.95", "prune.interval=1", "prune.start_epoch=2"),
)
REPORTING = (*SMALL, "tracking.uri=sqlite:///mlflow.db", "tracking.flush_seconds=0")
SWEEP = (
    "-m",
    "hydra/sweeper=morphtrain",
    "hydra.sweep.dir=sweep",
    "optimizer.lr=interval(0.05,0.1)",
    "hydra.sweeper.n_trials=99",
)
SIDE_BY_SIDE = ("+launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweeper.n_jobs=2")
COMMANDS = {
    "run": ("hydra.run.dir=run", "epochs=200"),
    "sweep": (*SWEEP, "epochs=6"),
    "sweep in two workers": (*SWEEP, *SIDE_BY_SIDE, "epochs=200"),
}
SHARES = {"run": 0.5, "sweep": 0.4, "sweep in two workers": 0.1}
EPOCHS = 8  # of a run that is killed again and again


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signals", type=int, default=300)
    parser.add_argument("--kills", type=int, default=80)
    parser.add_argument("--commands", type=float, default=0.2, help="share of the signals that go to commands")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        make_database(place / "empty.db")
        shutil.copy(place / "empty.db", place / "mlflow.db")
        to_commands = round(options.commands * options.signals)
        failures = in_this_process(place, options.signals - to_commands, draw)
        for kind, share in SHARES.items():
            failures += to_command(place, kind, round(share * to_commands), draw)
        failures += kills(place, options.kills, draw)
    print(f"interruptions: {failures} failures")
    return 1 if failures else 0


def make_database(path: Path) -> None:
    from morphtrain.tracking import store

    store.connect(f"sqlite:///{path}", "morphtrain")


def states(path: Path, query: str) -> list[Any]:
    """What a database holds; raises `sqlite3.OperationalError` if it is locked."""
    with closing(sqlite3.connect(path, timeout=0)) as database:
        database.execute("BEGIN IMMEDIATE")
        return [value for (value,) in database.execute(query)]


def shown(kind: str, number: int, wrong: Counter[str], slowest: float) -> int:
    said = ", ".join(f"{what}: {count}" for what, count in wrong.items()) or "all in order"
    print(f"interruptions: {number} signals to {kind}, the slowest end after {slowest:.2f} s; {said}", flush=True)
    return wrong.total()


def in_this_process(place: Path, number: int, draw: random.Random) -> int:
    """Signals to `train`: inside a step, a save, a statement of the database or a callback, and at random times."""
    import morphtrain
    from morphtrain import interrupts
    from morphtrain.trainer import train

    wrong: Counter[str] = Counter()
    slowest, done, started = 0.0, 0, 0
    database = place / "mlflow.db"
    config = morphtrain.compose(*SMALL, "epochs=12", f"tracking.uri=sqlite:///{database}", "tracking.flush_seconds=0")
    while done < number:
        started += 1
        run_dir = place / f"library {started}"
        run_dir.mkdir()
        signalled: list[float] = []
        disarm = aim(draw, signalled)
        try:
            train(config, run_dir, {})
            ended = None
        except interrupts.Interrupted:
            ended = time.monotonic()
        finally:
            disarm()
        if not signalled:  # the run was over before
            shutil.rmtree(run_dir)
            continue
        done += 1
        if ended is None:
            wrong["the signal was lost"] += 1
            continue
        slowest = max(slowest, ended - signalled[0])
        wrong["too late"] += ended - signalled[0] > LIMIT
        query = "SELECT status FROM runs JOIN tags USING (run_uuid) WHERE key = 'run_dir' AND tags.value LIKE '%/{}'"
        try:
            found = states(database, query.format(run_dir.name))
            wrong[f"in MLflow {found}"] += found not in (["KILLED"], [])  # none: before the run was made
        except sqlite3.OperationalError as error:
            wrong[str(error)] += 1
        wrong["left in the directory"] += any(path.name.endswith((".tmp", ".lock")) for path in run_dir.iterdir())
    return shown("train()", done, +wrong, slowest)


def aim(draw: random.Random, signalled: list[float]) -> Callable[[], None]:
    """Send this process a signal at a random moment, noting the time; returns what calls it off."""
    from sqlalchemy import Engine, event
    from torch.optim import SGD

    number = draw.choice((signal.SIGINT, signal.SIGTERM))
    over = threading.Event()

    def send(*_: Any) -> None:
        if not signalled and not over.is_set():
            signalled.append(time.monotonic())
            os.kill(os.getpid(), number)

    count = [draw.randint(1, 150)]

    def counted(*arguments: Any) -> None:
        count[0] -= 1
        if count[0] == 0:
            send()

    kind = draw.choice(("statement", "statement", "step", "save", "time"))
    if kind == "statement":
        moment = draw.choice(("before_cursor_execute", "after_cursor_execute", "commit", "checkin"))
        event.listen(Engine, moment, counted)
        return lambda: event.remove(Engine, moment, counted)
    if kind == "time":
        timer = threading.Timer(draw.uniform(0.05, 1.5), lambda: deferring() and send())
        timer.start()
        return lambda: (over.set(), timer.cancel(), timer.join())[0]
    owner, name = (SGD, "step") if kind == "step" else (os, draw.choice(("replace", "link", "fsync")))
    count[0] = draw.randint(1, 150 if kind == "step" else 11)
    original = getattr(owner, name)

    def around(*arguments: Any, **keywords: Any) -> Any:
        if deferring():
            counted()
        return original(*arguments, **keywords)

    setattr(owner, name, around)
    return lambda: setattr(owner, name, original)


def deferring() -> bool:
    """Whether the run has its handlers: before that, Python's own raise KeyboardInterrupt at once."""
    return signal.getsignal(signal.SIGINT) is not signal.default_int_handler


def to_command(place: Path, kind: str, number: int, draw: random.Random) -> int:
    """Signals to a command, or to its whole process group as by Ctrl-C, once its first run has begun."""
    wrong: Counter[str] = Counter()
    slowest = 0.0
    for trial in range(number):
        here = place / f"{kind} {trial}"
        here.mkdir()
        shutil.copy(place / "empty.db", here / "mlflow.db")
        which = draw.choice((signal.SIGINT, signal.SIGTERM))
        aimed = kind != "sweep in two workers" and draw.random() < 0.5
        seconds, code, said = (aimed_at if aimed else at_random)(here, kind, which, draw)
        slowest = max(slowest, seconds)
        wrong["too late"] += seconds > LIMIT
        wrong[f"exit code {code}"] += code != 128 + which
        wrong["a traceback"] += "Traceback" in said
        try:
            found = states(here / "mlflow.db", "SELECT status FROM runs")
            ended = {"KILLED", "FINISHED"} if kind == "sweep" else {"KILLED"}
            wrong[f"in MLflow {found}"] += not set(found) <= ended or "KILLED" not in found
            if kind != "run":
                trials = states(here / "optuna.db", "SELECT state FROM trials")
                wrong[f"in Optuna {trials}"] += not set(trials) <= {"WAITING", "COMPLETE"}
        except sqlite3.OperationalError as error:
            wrong[str(error)] += 1
        wrong["left over"] += any(path.name.endswith((".tmp", ".lock")) for path in here.rglob("*"))
        if os.environ.get("SHOW") and (+wrong):
            print(said)
        shutil.rmtree(here)
    return shown(f"a {kind}", number, +wrong, slowest)


def begun(arguments: list[str], here: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=here,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def aimed_at(here: Path, kind: str, which: signal.Signals, draw: random.Random) -> tuple[float, int, str]:
    """Inside the N-th statement of a database, step, save or report; seconds until the end, exit code, output."""
    most = {"sql": (250, 700), "step": (1, 500), "write": (1, 25), "renamed": (1, 50), "report": (1, 25)}
    event = draw.choice(list(most))
    name = which.name.removeprefix("SIG")
    moment = f"{event}:{draw.randint(*most[event])}:{name}"
    arguments = [str(TESTS / "killed_run.py"), moment, *REPORTING, *COMMANDS[kind]]
    process = begun(arguments, here, SIGNALLED_AT=str(here / "at"))
    said, _ = process.communicate(timeout=300)
    ended = time.monotonic()
    return ended - float((here / "at").read_text()), process.returncode, said


def at_random(here: Path, kind: str, which: signal.Signals, draw: random.Random) -> tuple[float, int, str]:
    """Some time after the first epoch."""
    process = begun(["-m", "morphtrain.run", *REPORTING, *COMMANDS[kind]], here)
    while not list(here.glob("*/**/last.pt")) and process.poll() is None:
        time.sleep(0.02)
    time.sleep(draw.uniform(0, 3))
    began = time.monotonic()
    (os.killpg if draw.random() < 0.5 else os.kill)(process.pid, which)
    said, _ = process.communicate(timeout=300)
    return time.monotonic() - began, process.returncode, said


def kills(place: Path, number: int, draw: random.Random) -> int:
    """Chains of SIGKILLs and resumes; each chain ends when a process reaches the end of the run."""
    if not number:
        return 0
    from test_resume import assert_same, contents

    arguments = [*SMALL, f"epochs={EPOCHS}", "tracking=none", "resume=auto"]
    subprocess.run([sys.executable, "-m", "morphtrain.run", *arguments, "hydra.run.dir=once"], cwd=place, check=True)
    once = contents(place / "once" / "last.pt")
    most = {"step": 40, "write": 3, "rename": 5, "renamed": 5, "morph": 8}
    killed = chains = different = 0
    while killed < number:
        chains += 1
        here = [*arguments, f"hydra.run.dir=chain {chains}"]
        ended = False
        while not ended:
            event = draw.choice(list(most))
            moment = f"{event}:{draw.randint(1, most[event])}"
            command = [str(TESTS / "killed_run.py"), moment] if killed < number else ["-m", "morphtrain.run"]
            result = subprocess.run([sys.executable, *command, *here], cwd=place, capture_output=True, text=True)
            ended = result.returncode == 0
            if not ended and result.returncode != -signal.SIGKILL:
                raise RuntimeError(result.stdout + result.stderr)
            killed += not ended
        try:
            assert_same(contents(place / f"chain {chains}" / "last.pt"), once)
        except AssertionError as error:
            different += 1
            print(f"interruptions: chain {chains} differs in {json.dumps(str(error))[:200]}")
    print(f"interruptions: {killed} kills in {chains} runs, {different} of which did not end bit for bit alike")
    return different


if __name__ == "__main__":
    sys.exit(main())
