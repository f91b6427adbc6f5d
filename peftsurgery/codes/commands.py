"""PSG9xx: what command lines are refused for."""

from peftsurgery.codes.entry import USAGE, CodeInfo

CODES = {
    "PSG901": CodeInfo(
        "The command line is not understood",
        "`peftsurgery --help` lists the commands, `peftsurgery COMMAND --help` the arguments "
        "of one.",
        USAGE,
    ),
    "PSG902": CodeInfo(
        "An optional package is not installed",
        "The command needs a package that comes with an extra; the hint has the line to "
        "install it.",
    ),
    "PSG904": CodeInfo(
        "An argument is not what the function takes",
        "The message names the argument and says what it was given and what it takes. The "
        "function's docstring (`help(peftsurgery.apply)`) lists all of them.",
        USAGE,
    ),
    "PSG905": CodeInfo(
        "Two things of different kinds cannot be compared",
        "`diff` compares two models, two rule files or two safetensors files. A model may be a "
        "directory, a hub id, a factory, a saved surgery, an adapter's directory or an ONNX file.",
        USAGE,
    ),
    "PSG903": CodeInfo(
        "There is no such error code",
        "`peftsurgery explain` without a code lists all of them.",
    ),
}
