"""A fold of two weights of a codec, as a process runs it: BASE ADAPTER OUT AGAIN.

It prints its peak memory.
"""

import sys
from pathlib import Path

from peftsurgery.checkpoint.plan import Planned
from peftsurgery.checkpoint.streaming import fold_files
from peftsurgery.tensor_file import read_header
from tests.checkpoint.streamed import plan_of

COUNT = 2


def main() -> None:
    base, adapter, out = map(Path, sys.argv[1:4])
    planned = Planned(plan_of(COUNT), base, read_header(adapter))
    fold_files(planned, out, requantise=sys.argv[4] == "again")
    status = Path("/proc/self/status").read_text().splitlines()
    print(int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024)


if __name__ == "__main__":
    main()
