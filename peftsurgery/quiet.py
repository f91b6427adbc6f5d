"""Other libraries kept off stderr while they work for this package.

What they raise is enough: a library's log of the same error, the warnings of its own code and its
progress bars tell a user nothing more, and commands show their own progress. Only what LIBRARIES
say, in this thread and while a block runs, is dropped; what a user's code logs, warns of or prints
is left as it is, and so are the handlers of loggers that a user set up.
"""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import lru_cache

LIBRARIES = ("torch", "transformers", "huggingface_hub", "accelerate", "bitsandbytes", "peft")
_MODULES = rf"({'|'.join(LIBRARIES)}|peftsurgery)(\.|$)"


class _Mute(logging.Filter):
    """Drops what libraries log in the thread that made this filter, from warnings up."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is shown."""
        if record.thread != self._thread or record.levelno < logging.WARNING:
            return True
        return record.name.partition(".")[0] not in LIBRARIES


@contextmanager
def unlogged() -> Iterator[None]:
    """Drop what libraries log on handlers of their own, or on stderr for lack of a handler."""
    handlers = _handlers()
    mute = _Mute()
    for handler in handlers:
        handler.addFilter(mute)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(mute)


def _handlers() -> list[logging.Handler]:
    """The handlers of the libraries' loggers, of which torch's parts have their own, and stderr's.

    All loggers are looked through only when there are more of them than before.
    """
    loggers = _with_handlers(len(logging.root.manager.loggerDict))
    found = [handler for logger in loggers for handler in logger.handlers]
    return [*found, *([] if logging.lastResort is None else [logging.lastResort])]


@lru_cache(maxsize=1)
def _with_handlers(count: int) -> tuple[logging.Logger, ...]:
    """The loggers of libraries themselves, and those of their parts that have handlers.

    Of ``count`` loggers that there are.
    """
    known = {name: logging.getLogger(name) for name in LIBRARIES}
    for name, log in list(logging.root.manager.loggerDict.items()):
        is_ours = name.partition(".")[0] in LIBRARIES
        if is_ours and isinstance(log, logging.Logger) and log.handlers:
            known[name] = log
    return tuple(known.values())


class _Shared:
    """A context of the whole process, which blocks of several threads are in at one time.

    The first of them enters it, and the last one leaves it: left in another order than entered,
    contexts that put back what they found would put back each other's.
    """

    def __init__(self, context: Callable[[], AbstractContextManager[None]]) -> None:
        self._context = context
        self._lock, self._depth, self._open = threading.Lock(), 0, ExitStack()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Within the context at least until this block ends."""
        with self._lock:
            if not self._depth:
                self._open.enter_context(self._context())
            self._depth += 1
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1
                if not self._depth:
                    self._open.close()


@contextmanager
def _no_bars() -> Iterator[None]:
    from transformers.utils import logging as theirs

    shown = theirs.is_progress_bar_enabled()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            theirs.enable_progress_bar()


@contextmanager
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=_MODULES)
        yield


_BARS, _WARNINGS = _Shared(_no_bars), _Shared(_no_warnings)


@contextmanager
def quiet() -> Iterator[None]:
    """Drop the logs, the warnings and the progress bars of libraries; usable as a decorator too."""
    with ExitStack() as stack:
        if "transformers" in sys.modules:
            stack.enter_context(_BARS.entered())
        stack.enter_context(unlogged())
        stack.enter_context(_WARNINGS.entered())
        yield
