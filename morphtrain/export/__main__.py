"""The command: a network in ONNX, as a torch.export program, or as a plain state dict.

python -m morphtrain.export outputs/2026-01-31/12-00-00-000000/best.pt
python -m morphtrain.export last.pt --format state_dict --output net.state_dict.pt --model my_nets.Net
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from morphtrain.errors import UserError
from morphtrain.export import FORMATS, TOLERANCE
from morphtrain.flags import Parser
from morphtrain.wording import command_name

if TYPE_CHECKING:
    from morphtrain.preprocessing import Preprocessing

FORMAT_HELP = (
    "onnx, of opset 20, which is the default; torch_export: a .pt2 file for torch.export.load; state_dict: the values, "
    "and the structure beside them (NAME.architecture.json)"
)
MODEL_HELP = "for a network of your own: its class or a function that makes it, which is imported and called"
RAW_HELP = "of a run with ema, the weights as trained, in the place of their averages"
TOLERANCE_HELP = "largest difference of an output, as a share of the largest output; %(default)g if it is not given"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0 if the network is written, 1 otherwise."""
    parser = Parser(
        prog=command_name("export"),
        description="Write the network of a checkpoint for use elsewhere, with a batch of any size, and beside it "
        "how images are normalised (NAME.preprocessing.json). What is written is read again and compared with the "
        "network first.",
    )
    parser.add_argument("checkpoint", type=Path, help="last.pt or best.pt of a run, or a file of morphtrain.save")
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help=FORMAT_HELP)
    parser.add_argument("--output", type=Path, help="the file; by default beside the checkpoint, with its name")
    parser.add_argument("--model", metavar="PACKAGE.NET", help=MODEL_HELP)
    parser.add_argument("--raw", action="store_true", help=RAW_HELP)
    parser.add_argument("--input-shape", type=_shape, metavar="C,H,W", help="of one image, if the checkpoint lacks it")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help=TOLERANCE_HELP)
    try:
        _export(parser.parse_args(arguments))
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _export(options: argparse.Namespace) -> None:
    """Load, export, and say what was written."""
    import importlib  # torch is slow to import; --help does without it
    from dataclasses import replace

    from morphtrain import custom
    from morphtrain.export.origin import origin
    from morphtrain.export.write import export
    from morphtrain.trainer import networks

    stored = networks.read(options.checkpoint)
    preprocessing = stored.preprocessing()
    if options.input_shape is not None:
        preprocessing = replace(preprocessing, input_shape=options.input_shape)
    model = None if options.model is None else custom.find("model", options.model)
    network = networks.load(stored, model, options.raw)
    suffix: str = importlib.import_module(f"morphtrain.export.{options.format}").SUFFIX
    output = options.output or options.checkpoint.with_suffix(suffix)
    if output.exists() and output.samefile(options.checkpoint):
        raise UserError(f"--output {output}: is the checkpoint itself; another name")
    written = export(network, output, options.format, preprocessing, options.tolerance, origin(stored))
    print(f"{output}: differs from the network by at most {written.difference:.2g} of the largest output")
    for path in written.files[1:]:
        print(path)
    print(_said(preprocessing))


def _said(preprocessing: Preprocessing) -> str:
    """A line about inputs and outputs: what is known of them, and what is not."""
    known = f"images (batch, {', '.join(map(str, preprocessing.input_shape or ()))})"
    if preprocessing.unknown:
        known += f"; not known, since the data set has not said it: {', '.join(preprocessing.unknown)}"
    return known


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
