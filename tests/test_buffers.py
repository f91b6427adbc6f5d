"""Memory of freed buffers: pages that the system has to find again are counted, not timed."""

import subprocess
import sys

import pytest

ROUNDS, SIZE = 10, 24 * 2**20

COUNTED = """
import resource, sys
from peftsurgery import buffers
getattr(buffers, sys.argv[1])()
rounds, size = int(sys.argv[2]), int(sys.argv[3])
for number in range(rounds + 2):
    if number == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    both = bytearray(size), bytearray(size)
    for each in both:
        each[::4096] = bytes(b"x" * len(range(0, size, 4096)))
    del both, each
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's ways")
@pytest.mark.parametrize("way", ["keep_buffers", "give_buffers_back"])
def test_pages_of_freed_buffers_are_kept_or_not(way: str) -> None:
    command = [sys.executable, "-c", COUNTED, way, str(ROUNDS), str(SIZE)]
    pages = int(subprocess.check_output(command, text=True))
    of_buffers = ROUNDS * 2 * SIZE // 4096
    assert pages < of_buffers / 100 if way == "keep_buffers" else pages >= of_buffers / 512
