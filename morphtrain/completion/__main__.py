"""The command: a script that makes a shell complete MorphTrain's commands, their options, keys and flags.

eval "$(python -m morphtrain.completion bash)"
python -m morphtrain.completion fish | source
"""

from __future__ import annotations

import sys

from morphtrain.completion import SHELLS, script
from morphtrain.flags import Parser
from morphtrain.wording import command_name

EPILOG = 'bash and zsh: eval "$({command} bash)" in ~/.bashrc or ~/.zshrc; fish: {command} fish | source'


def main() -> None:
    """The command; `query -- WORDS`, which the script asks, prints what the last of the words may become."""
    if sys.argv[1:3] == ["query", "--"]:
        from morphtrain.completion.query import candidates

        print("\n".join(candidates(sys.argv[3:])))
        return
    prog = command_name("completion")
    parser = Parser(
        prog=prog,
        description="Print the script by which a shell completes MorphTrain's commands.",
        epilog=EPILOG.format(command=prog),
        allow_abbrev=False,
    )
    parser.add_argument("shell", choices=SHELLS)
    print(script(parser.parse_args().shell))


if __name__ == "__main__":
    main()
