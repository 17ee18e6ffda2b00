"""Keep of runs what the notebooks read: records, configs and environments, without checkpoints, host names and paths.

python notebooks/keep.py experiments/amp_levels-small notebooks/data/formats

What was kept there before is replaced. Numbers are rounded to six digits. A run that has not come to its end is left
out; so the runs that are kept need no picture to show that they have.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from morphtrain.evidence.records import DECLARATION, FILE, LEFT_AT_THE_END, read_records

COPIED = (Path(".hydra", "config.yaml"), Path(".hydra", "overrides.yaml"))
ENVIRONMENT = Path("environment.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a directory with runs below it")
    parser.add_argument("target", type=Path, help="what is kept goes there")
    given = parser.parse_args()
    finished = sorted(path.parent for path in given.source.rglob(LEFT_AT_THE_END))
    if not finished:
        parser.error(f"{given.source}: holds no run that has come to its end")
    shutil.rmtree(given.target, ignore_errors=True)
    if (declaration := given.source / DECLARATION).exists():
        given.target.mkdir(parents=True)
        shutil.copy(declaration, given.target)
    for run in finished:
        keep(run, given.target / run.relative_to(given.source))
    print(f"{given.target}: {len(finished)} runs")


def keep(run: Path, target: Path) -> None:
    """Write the run directory `run` to `target`, without what others need not know."""
    (target / ".hydra").mkdir(parents=True)
    records = [{name: rounded(value) for name, value in record.items()} for record in read_records(run)]
    (target / FILE).write_text("".join(f"{json.dumps(record)}\n" for record in records))
    for path in COPIED:
        (target / path).write_text((run / path).read_text().replace(f"{Path.cwd()}/", ""))
    facts = json.loads((run / ENVIRONMENT).read_text())
    told = {name: value for name, value in facts.items() if name not in ("host", "before")}
    (target / ENVIRONMENT).write_text(json.dumps(told, indent=1))


def rounded(value: float) -> float:
    """To six digits, or to a whole number."""
    return value if isinstance(value, int) else round(value) if abs(value) >= 1e6 else float(f"{value:.6g}")


if __name__ == "__main__":
    main()
