"""Times and memory, measured: ``tools/bench/run``, or ``python -m tools.bench``."""
