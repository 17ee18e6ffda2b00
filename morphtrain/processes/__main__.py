"""A process that `processes=N` has started: `python -m morphtrain.processes`, with its place in the environment."""

from __future__ import annotations

from morphtrain import interrupts
from morphtrain.processes.local import end_with_parent


def main() -> None:
    """Follow the run that has started this process."""
    end_with_parent()
    with interrupts.command():
        from morphtrain.processes.follow import follow  # takes seconds, in which the run may end

        code = follow()
    interrupts.leave(code)


if __name__ == "__main__":
    main()
