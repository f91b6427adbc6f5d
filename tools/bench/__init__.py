"""Times and memory, measured: ``tools/bench/run``, or ``python -m tools.bench``."""

import os
import sys

# What is installed has its bytecode. Where none may be written, each start would compile it all.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
