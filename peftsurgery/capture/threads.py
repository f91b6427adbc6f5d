"""Locks around captures: one trace at a time, and none while other threads compute.

torch.export changes what all threads share. It puts another forward, another mode and other tensors
into the module that it traces; so whoever makes a capture, or reads that module, waits for its turn
(:func:`making`). It sees whatever module is called; so the modules of other threads are left out
(:func:`traced_alone`). And it switches off the fast kernels for processors, which round otherwise;
so what is computed on a processor waits for the trace to end, and the trace for what is being
computed (:data:`GATE`). All else goes on: a call that is captured already needs no turn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from torch import fx, nn
from torch.fx.experimental import proxy_tensor

from peftsurgery.capture.stack import called_lines

# What a call waits for may itself wait for a capture (in a hook, or in another process): a trace
# gives it so many seconds, and begins then, at the price of another rounding.
PATIENCE = 20.0

Made = TypeVar("Made")

_LOCK = threading.Lock()
# Goes with whatever runs for the holder, in a thread of its own too: a capture may need another.
_IS_HELD: ContextVar[bool] = ContextVar("a capture is being made", default=False)


@contextmanager
def making() -> Iterator[None]:
    """Hold the lock of captures: no other thread traces, or changes a traced module, within.

    This is the only lock that is held while a capture is made; it is entered again at will.
    """
    if _IS_HELD.get():
        yield
        return
    with GATE.outside(), _LOCK:
        token = _IS_HELD.set(True)
        try:
            yield
        finally:
            _IS_HELD.reset(token)


def known_or_made(known: Callable[[], Made | None], make: Callable[[], Made]) -> Made:
    """What is known already, else what ``make`` makes and keeps; only making it waits."""
    found = known()
    if found is None:
        with making():
            found = known()  # another thread may have made it meanwhile
            if found is None:
                found = make()
    return found


class Gate:
    """Readers-writer gate: any number of calls compute, or one trace runs."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._here = threading.local()
        self._passing = 0
        self._tracer: int | None = None

    def enter(self) -> None:
        """Wait until no other thread traces, then count this thread as computing.

        Pair with `leave`.
        """
        depth = getattr(self._here, "depth", 0)
        if not depth:
            with self._changed:
                while self._tracer not in (None, threading.get_ident()):
                    self._changed.wait()
                self._passing += 1
        self._here.depth = depth + 1

    def leave(self) -> None:
        """Count this thread as done computing."""
        self._here.depth -= 1
        if not self._here.depth:
            with self._changed:
                self._passing -= 1
                if self._tracer is not None:
                    self._changed.notify_all()

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Count this thread as idle within the context, although it was called while computing."""
        depth = getattr(self._here, "depth", 0)
        if depth:
            self._here.depth = 1
            self.leave()
        try:
            yield
        finally:
            if depth:
                self.enter()
                self._here.depth = depth

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Keep all other threads from computing within the context.

        One thread at a time may enter.
        """
        try:
            with self._changed:
                self._tracer = threading.get_ident()
                self._changed.wait_for(lambda: not self._passing, PATIENCE)
            yield
        finally:
            with self._changed:
                self._tracer = None
                self._changed.notify_all()


GATE = Gate()


class _OneThread(proxy_tensor._ModuleStackTracer):
    """torch.export's tracer, which sees every module that is called; here only its own thread's."""

    def __init__(self, scope_root: fx.GraphModule) -> None:
        super().__init__(scope_root)
        self.thread = threading.get_ident()
        self.record_stack_traces = False  # as create_node does it

    def create_node(self, *args: object, **kwargs: object) -> fx.Node:
        """A node of the graph, which knows the lines that made it."""
        node = super().create_node(*args, **kwargs)
        node.stack_trace = node.stack_trace or called_lines()
        return node

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> Any:
        """What the module returns, noted as a part of the trace if it is one."""
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: object, parameter_proxy_cache: dict[str, Any]) -> object:
        """An attribute of a module, or what stands for it in the trace."""
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


_METADATA = "_extract_tensor_metadata"


def _untold() -> Callable[..., Any]:
    """What describes a traced tensor a second time, beside its value; here not for this thread.

    To tell its memory format takes long, and nothing asks for it.
    """
    told, thread = vars(proxy_tensor).get(_METADATA), threading.get_ident()

    def metadata(*args: Any, **kwargs: Any) -> Any:
        return None if told is None or threading.get_ident() == thread else told(*args, **kwargs)

    return metadata


@contextmanager
def traced_alone() -> Iterator[None]:
    """Make torch.export trace the calls of its own thread alone, while no other thread computes.

    To be entered by one thread at a time, as :func:`making` lets them.
    """
    ours = {"_ModuleStackTracer": _OneThread, _METADATA: _untold()}
    theirs = {name: vars(proxy_tensor)[name] for name in ours if name in vars(proxy_tensor)}
    with GATE.closed():
        try:
            vars(proxy_tensor).update((name, ours[name]) for name in theirs)
            yield
        finally:
            vars(proxy_tensor).update(theirs)
