"""One worker of a shared study, without training: takes trials, waits a moment in each, ends them.

python shared_worker.py storage directory total seconds_per_trial
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import optuna

from morphtrain.sweep.study import Plan, SharedStudy
from morphtrain.sweep.workers import Worker


def main() -> None:
    storage, directory, total, seconds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    plan = Plan("shared", storage, ["minimize"], {"objective": ["x"]}, total, {})
    study = SharedStudy(plan, optuna.samplers.RandomSampler(seed=1), optuna.pruners.NopPruner())
    with Worker(study.storage, directory, heartbeat_seconds=0.5) as worker:
        while True:
            trials = study.take(worker, 2, lambda trial: trial.suggest_float("x", 0, 1))
            if not trials and not study.others_running():
                break
            for trial in trials:
                x = trial.params["x"]
                print(trial.number, flush=True)
                time.sleep(seconds * random.uniform(0.5, 1.5))
                study.complete(worker, trial, [x])
            time.sleep(0.01)


if __name__ == "__main__":
    main()
