"""Hidden states and attentions that transformers collects: a part of what a block's call gives.

Asked for more than a model returns by itself, transformers puts hooks on modules, which append what
is returned to lists, for as long as the model's call lasts. To a trace, what comes to these lists
while a block is called is a result of the block. A hook for which nothing collects does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers.utils import output_capturing

Collected = Mapping[str, list[Any]]
_SELECTED = "_hidden_states_layers"  # which of them are wanted, by the number collected before
_TOLD = (str, int, bool, type(None))


def is_collecting(hook: Callable[..., Any]) -> bool:
    """Whether a hook is one of transformers' that collect."""
    return getattr(hook, "__module__", None) == output_capturing.__name__


def told_of_hooks(part: nn.Module) -> tuple[Any, ...]:
    """What the collecting hooks of a module collect: equal for hooks that do the same."""
    return tuple(
        (hook.__qualname__, *(c.cell_contents for c in cells if type(c.cell_contents) in _TOLD))
        for hook in part._forward_hooks.values()
        if is_collecting(hook)
        for cells in [hook.__closure__ or ()]
    )


def collected() -> Collected:
    """What was collected up to now in the call that is under way, by what is wanted."""
    found = output_capturing._active_collector.get() or {}
    return {key: values for key, values in found.items() if key != _SELECTED}


def told_of_collected() -> Any:
    """What hooks go by: whether they are the first to collect, and which number is wanted."""
    found = output_capturing._active_collector.get() or {}
    if found.get(_SELECTED) is not None:
        return sorted(found[_SELECTED]), [(key, len(values)) for key, values in collected().items()]
    return [(key, bool(values)) for key, values in collected().items()]
