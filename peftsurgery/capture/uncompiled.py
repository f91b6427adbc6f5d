"""Graphs that torch.export makes, left as graphs: what is read and never run is not compiled.

torch.export makes some twenty graph modules of one model, one after the other, and the code of each
is written and compiled. A capture reads the nodes of the last one. Where one of them is called
after all, it is compiled then.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx
from torch.fx.graph import _PyTreeCodeGen


@contextmanager
def uncompiled() -> Iterator[None]:
    """Let graph modules that this thread makes within the context be compiled when called first."""
    modules: Any = fx.GraphModule
    thread, compiled = threading.get_ident(), modules.recompile

    def called(self: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        compiled(self)
        return self(*args, **kwargs)

    def recompile(self: fx.GraphModule) -> Any:
        if threading.get_ident() != thread:
            return compiled(self)
        if isinstance(self._graph._codegen, _PyTreeCodeGen):
            told = self._graph._codegen.pytree_info
            self._in_spec, self._out_spec = told.in_spec, told.out_spec
        kind: Any = type(self)
        kind.forward = called
        return None

    modules.recompile = recompile
    try:
        yield
    finally:
        modules.recompile = compiled
