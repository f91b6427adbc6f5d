"""Processes that do the work of this one beside it, task by task.

Threads that compute with numpy wait for Python's lock after every operation, and two of them get
no more done than one and a half. A process that is forked has all that was read and planned so far,
and a lock of its own. It is told its tasks and tells what became of them as lines of JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ctypes import CDLL, c_ulong
from typing import Any

from peftsurgery.errors import SurgeryError

_PR_SET_PDEATHSIG = 1  # of Linux's <sys/prctl.h>
MOST = 7  # to fork one takes some milliseconds, and no disk keeps more of them at work
WITH_THREADS = ("torch", "fsspec")  # a forked process would wait for threads that these have


class Twin:
    """A process that does one kind of work, and ends when it is told to or with this process."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        """``work`` makes something of a task; both are what JSON can hold. OSError if refused."""
        tasks, ask = os.pipe()
        answer, answers = os.pipe()
        parent = os.getpid()
        try:
            self._process = os.fork()
        except OSError:
            for handle in (tasks, ask, answer, answers):
                os.close(handle)
            raise
        if not self._process:
            try:
                os.close(ask)
                os.close(answer)
                _end_with(parent)
                _serve(work, tasks, answers)
            finally:
                os._exit(0)
        os.close(tasks)
        os.close(answers)
        self._ask, self._answer = os.fdopen(ask, "wb", 0), os.fdopen(answer, "rb")

    def done(self, task: Any) -> Any:
        """Have a task done, and give what was made of it.

        Raises what the work raised, RuntimeError for what is neither a SurgeryError nor an OSError;
        ChildProcessError if the process is no more.
        """
        try:
            self._ask.write(json.dumps(task).encode() + b"\n")
            said = json.loads(self._answer.readline() or b"{}")
        except BrokenPipeError:
            said = {}
        if "refused" in said:
            raise SurgeryError(*said["refused"])
        if "system" in said:
            raise OSError(*said["system"])
        if "failed" in said:
            raise RuntimeError(said["failed"])
        if "done" not in said:
            raise ChildProcessError("a process that worked on it was ended")
        return said["done"]

    def end(self) -> None:
        """Have the process end, and wait until it did."""
        self._ask.close()
        self._answer.close()
        os.waitpid(self._process, 0)


@contextmanager
def twins_for(work: Callable[[Any], Any], count: int) -> Iterator[list[Twin | None]]:
    """So many processes for one kind of work while the block runs; None for each that cannot be.

    No thread should run yet.
    """
    can_fork = sys.platform == "linux" and sys.modules.keys().isdisjoint(WITH_THREADS)
    twins = list[Twin]()
    try:
        with suppress(OSError):  # as many as the system allows
            while can_fork and len(twins) < min(count, MOST):
                twins.append(Twin(work))
        yield [*twins, *[None] * (count - len(twins))]
    finally:
        for twin in reversed(twins):  # each holds the pipes of those before it
            twin.end()


def _end_with(parent: int) -> None:
    """Have the system end this process when its parent ends, however that is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its parent hears of it too, and tells it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    CDLL(None).prctl(_PR_SET_PDEATHSIG, c_ulong(signal.SIGKILL))
    if os.getppid() != parent:  # it ended before that was said
        os._exit(0)


def _serve(work: Callable[[Any], Any], tasks: int, answers: int) -> None:
    """Do tasks until there are no more."""
    with os.fdopen(tasks, "rb") as lines, os.fdopen(answers, "wb", 0) as told:
        for line in lines:
            told.write(json.dumps(_answered(work, json.loads(line))).encode() + b"\n")


def _answered(work: Callable[[Any], Any], task: Any) -> dict[str, Any]:
    """What is told of a task: what was made of it, or why it was not."""
    try:
        return {"done": work(task)}
    except SurgeryError as error:
        return {"refused": error.args}
    except OSError as error:
        return {"system": (error.errno, error.strerror, error.filename)}
    except Exception:  # noqa: BLE001 whatever it is, it is raised where the task is from
        return {"failed": traceback.format_exc()}
