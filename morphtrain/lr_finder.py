"""The command: which learning rates train, by a range test (Smith 2015, arXiv 1506.01186, section 3.3).

python -m morphtrain.lr_finder
python -m morphtrain.lr_finder model=resnet20 data=cifar10 optimizer=adamw --steps 500 --from 1e-6 --to 1
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from morphtrain.flags import Parser
from morphtrain.wording import command_name

DESCRIPTION = (
    "Train for a few hundred steps at learning rates that rise exponentially, and write the loss by rate as a picture "
    "and as a table. The arguments without dashes are overrides, as those of morphtrain.run. Nothing is tracked, and "
    "no network is kept."
)


def main() -> None:
    """The command; exits with 1 and a message after a user's mistake, with 128 + the signal's number after a signal."""
    options = parse(sys.argv[1:])
    from morphtrain.run import with_messages  # Hydra is slow to import; --help does without it

    def find() -> None:
        from morphtrain import schema
        from morphtrain.compare.command import check_effect
        from morphtrain.trainer.lr_range import show

        check_effect("a range test", options.overrides, besides=("schedule", "stop_at", "ema"))
        config = schema.compose(*options.overrides, config_dir=options.config_dir)
        show(config, options.lowest, options.highest, options.steps, options.output or _directory())

    with_messages(find)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = Parser(prog=command_name("lr_finder"), description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", help="as model=resnet20 optimizer=adamw")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="training steps (%(default)s)")
    parser.add_argument(
        "--from", dest="lowest", type=float, default=1e-5, metavar="LR", help="lowest rate (%(default)s)"
    )
    parser.add_argument(
        "--to", dest="highest", type=float, default=10.0, metavar="LR", help="highest rate (%(default)s)"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="for picture and table; by default one in outputs/")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="with option files of your own")
    return parser.parse_intermixed_args(words)


def _directory() -> Path:
    """Where a run of this moment would write."""
    return Path(datetime.now().strftime("outputs/%Y-%m-%d/%H-%M-%S-%f"))


if __name__ == "__main__":
    main()
