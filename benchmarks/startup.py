"""How long commands that train nothing take, against an interpreter that does nothing."""

from __future__ import annotations

import subprocess
import sys
from statistics import median

from interleaved import interleave

LIMIT = 0.6  # seconds


def main() -> None:
    def command(*arguments: str):
        return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

    run = ("-m", "morphtrain.run")
    seconds = interleave(
        {
            "bare python": command("-c", "pass"),
            "--help": command(*run, "--help"),
            "--cfg job": command(*run, "--cfg", "job"),
            "morphtrain --help": command("-m", "morphtrain", "--help"),
            "morphtrain run --cfg job": command("-m", "morphtrain", "run", "--cfg", "job"),
            "a completion": command("-m", "morphtrain.completion", "query", "--", "morphtrain", "run", "prune=p"),
        },
        rounds=9,
    )
    bare = median(seconds.pop("bare python"))
    for name, values in seconds.items():
        spent = median(values)
        print(
            f"start-up: {name} = {spent:.3f} s, {spent / bare:.0f} times a bare interpreter   "
            f"limit {LIMIT:.1f} s {'ok' if spent <= LIMIT else 'EXCEEDED'}"
        )


if __name__ == "__main__":
    main()
