"""Processes that work beside one: what they give, what they raise, and that none stays."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peftsurgery.checkpoint.twin import Twin, twins_for
from peftsurgery.errors import SurgeryError

HOLDS = """
import sys, time
from peftsurgery.checkpoint.twin import Twin
twin = Twin(lambda task: __import__("os").getpid())
print(twin.done(None), flush=True)
time.sleep(60)
"""
REFUSED = """
import errno, os
from peftsurgery.checkpoint.twin import twins_for
def refuse():
    raise BlockingIOError(errno.EAGAIN, "no more processes")
os.fork, handles = refuse, len(os.listdir("/proc/self/fd"))
with twins_for(lambda task: task, 2) as twins:
    print(twins, len(os.listdir("/proc/self/fd")) - handles)
"""
WITHOUT_TORCH = """
import os
from peftsurgery.checkpoint.twin import twins_for
with twins_for(lambda task: [os.getpid(), task], 2) as twins:
    found = [twin.done(number) for number, twin in enumerate(twins)]
own = {os.getpid(), *(process for process, _ in found)}
print(len(own), [task for _, task in found])
"""


def work(task: Any) -> Any:
    if task == "refuse":
        raise SurgeryError("PSG403", "it holds NaN", "mend it", "file:1:2")
    if task == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")
    if task == "fail":
        raise ZeroDivisionError("a fault")
    return {"of": os.getpid(), "task": task, "value": 0.1 + 0.2}


@pytest.fixture
def twin() -> Iterator[Twin]:
    made = Twin(work)
    yield made
    made.end()


def test_a_twin_does_tasks_in_a_process_of_its_own(twin: Twin) -> None:
    found = [twin.done([number, "text"]) for number in range(3)]
    assert [each["task"] for each in found] == [[number, "text"] for number in range(3)]
    assert {each["value"] for each in found} == {0.1 + 0.2}
    (process,) = {each["of"] for each in found}
    assert process != os.getpid()


def test_what_the_work_raises_is_raised_where_the_task_is_from(twin: Twin) -> None:
    with pytest.raises(SurgeryError) as refused:
        twin.done("refuse")
    assert refused.value.args == ("PSG403", "it holds NaN", "mend it", "file:1:2")
    with pytest.raises(OSError, match="a file") as full:
        twin.done("full")
    assert (full.value.errno, full.value.filename) == (errno.ENOSPC, "a file")
    with pytest.raises(RuntimeError, match="ZeroDivisionError: a fault"):
        twin.done("fail")
    assert twin.done("next")["task"] == "next"


def test_a_twin_that_is_killed_is_an_error_of_the_system(twin: Twin) -> None:
    os.kill(twin.done(None)["of"], signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(ChildProcessError, match="was ended"):
            twin.done(None)


def runs(process: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().split()[2]
    except OSError:
        return False


def test_a_twin_ends_with_the_process_that_it_is_of() -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDS], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        process = int(parent.stdout.readline())
        assert runs(process)
        parent.kill()
    until = time.monotonic() + 10
    while runs(process):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_beside_libraries_with_threads_there_are_none() -> None:
    assert "torch" in sys.modules
    with twins_for(work, 2) as twins:
        assert twins == [None, None]
    assert printed(WITHOUT_TORCH) == "3 [0, 1]\n"


def test_where_the_system_refuses_processes_there_are_none() -> None:
    assert printed(REFUSED) == "[None, None] 0\n"


def printed(script: str) -> str:
    """What a process without torch prints."""
    command = [sys.executable, "-c", script]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
