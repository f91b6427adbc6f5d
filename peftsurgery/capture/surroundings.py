"""What surrounds a call: what of it a capture is for, and how a capture is made outside the rest.

Modes (FakeTensorMode, FlopCounterMode, default devices), transforms (torch.func), inference mode,
hooks on saved tensors and tracers are a thread's own. So a capture is made in a thread of its own,
where none of them is. What changes dtypes or the choice of kernels cannot be left out: autocast,
the default dtype and determinism decide what the model's own code does, and a capture is for one
state of them.
"""

from __future__ import annotations

import contextvars
import ctypes
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

Result = TypeVar("Result")

# The devices that torch can autocast for.
DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia", "ipu", "xla", "privateuseone")

_HERE = threading.local()


@dataclass(frozen=True)
class Surroundings:
    """Ambient state of a call: autocast dtypes by device, default dtype, determinism."""

    autocast: tuple[tuple[str, torch.dtype], ...]
    dtype: torch.dtype
    deterministic: bool

    def without_autocast(self) -> Surroundings:
        """The same state with every autocast off."""
        return replace(self, autocast=())

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Enter autocast as recorded; other state belongs to the process."""
        wanted = dict(self.autocast)
        with ExitStack() as stack:
            for device in {*wanted, *dict(surroundings().autocast)}:
                on = device in wanted
                stack.enter_context(torch.autocast(device, wanted.get(device), enabled=on))
            yield


def surroundings() -> Surroundings:
    """The state of the running thread."""
    on: tuple[tuple[str, torch.dtype], ...] = ()
    if torch._C._is_any_autocast_enabled():
        on = tuple(
            (device, torch.get_autocast_dtype(device))
            for device in DEVICES
            if torch.is_autocast_enabled(device)
        )
    return Surroundings(on, torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled())


def outside(function: Callable[[], Result], state: Surroundings) -> Result:
    """Call ``function`` in a fresh thread, surrounded by ``state`` alone, and return its result.

    It runs in a thread of its own, with the caller's context variables. Whatever ends the caller's
    wait interrupts it too. Called from within, it runs at once.
    """
    if getattr(_HERE, "outside", False):
        with state.entered():
            return function()
    task = _Task(function, state)
    try:
        with ThreadPoolExecutor(1, "capture") as pool:
            try:
                return pool.submit(contextvars.copy_context().run, task).result()
            except BaseException:
                task.interrupt()
                raise
    finally:  # a pool does not know a thread that was starting as an interrupt came
        if task.thread is not None:
            task.thread.join()


class _Task(Generic[Result]):
    """One function call, to be run in a fresh thread."""

    def __init__(self, function: Callable[[], Result], state: Surroundings) -> None:
        self.function, self.state = function, state
        self.device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self.thread: threading.Thread | None = None
        self.is_wanted, self.is_done = True, False

    def __call__(self) -> Result:
        """What the function returns."""
        self.thread = threading.current_thread()
        try:
            return self._made()
        finally:
            self.is_done = True

    def _made(self) -> Result:
        if not self.is_wanted:
            raise KeyboardInterrupt
        _HERE.outside = True
        if self.device is not None:
            torch.cuda.set_device(self.device)
        with _disable_current_modes(), self.state.entered():
            return self.function()

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt in the thread, as Ctrl-C does in the main one, if it goes on."""
        self.is_wanted = False
        if self.thread is None or self.is_done:
            return
        raised = ctypes.py_object(KeyboardInterrupt)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.thread.ident or 0), raised)
