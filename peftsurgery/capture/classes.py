"""The classes of captured modules: each is one of ours and the original's own.

Libraries ask a module what it is in many ways: by its class's name, by isinstance, by attributes of
the class or of the object, by methods that only read. A captured module is an instance of the
original's class, so all of these give the original's answer. What it does itself (its forward, how
it is called) comes first, and what would change or write it in a way that a capture cannot follow
is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from peftsurgery.errors import SurgeryError

_AGAIN = "do it to the original, and capture that again"
_ADAPTERS = "adapters are put in by apply() or from_peft(), and switched by activate()"
FILES = "save() writes what was learnt, fold() makes a model of the original's class"
_RECOMPUTE = "ask the captured model itself for it"

# one row for all methods that are refused with the same hint
_ROWS: Mapping[str, str] = {
    "resize_token_embeddings resize_position_embeddings": _AGAIN,
    "set_input_embeddings set_output_embeddings set_encoder set_decoder": _AGAIN,
    "set_attn_implementation set_experts_implementation set_use_kernels dequantize": _AGAIN,
    "initialize_weights init_weights tie_weights insert pop clear": _AGAIN,
    "generate_batch init_continuous_batching continuous_batching_context_manager": _AGAIN,
    "add_adapter load_adapter set_adapter enable_adapters disable_adapters": _ADAPTERS,
    "delete_adapter enable_peft_hotswap get_adapter_state_dict": _ADAPTERS,
    "save_pretrained push_to_hub save_distributed_checkpoint": FILES,
    "activation_checkpointing_enable activation_checkpointing_disable": _RECOMPUTE,
    "gradient_checkpointing_enable gradient_checkpointing_disable": _RECOMPUTE,
}
REFUSED: Mapping[str, str] = MappingProxyType(
    {name: hint for names, hint in _ROWS.items() for name in names.split()}
)
"""Methods of transformers' classes that a captured module has not, and what to do instead."""

_OF_ANY = frozenset(vars(nn.Module()))
_REFUSED_OF_CLASS = ("from_pretrained", "_from_config")


def become_like(
    module: nn.Module, original: nn.Module, namespace: Mapping[str, Any] | None = None
) -> None:
    """Make ``module`` an instance of the original's class too, and copy its plain attributes.

    Tensors and modules are not among them, nor what holds any; lists, dicts and sets are copied.
    ``namespace`` are further attributes of the class.
    """
    classes: tuple[Any, Any] = type(module), type(original)
    own = _OF_ANY | vars(module).keys()
    kind = type(module)
    module.__class__ = _class_like(*classes, tuple((namespace or {}).items()))
    settings = {
        name: value.copy() if isinstance(value, list | dict | set) else value
        for name, value in vars(original).items()
        if name not in own and not hasattr(kind, name) and _is_plain(value)
    }
    module.__dict__.update(settings, _settings=frozenset(settings))


@lru_cache(maxsize=4096)
def _class_like(
    kind: type[nn.Module], original: type[nn.Module], namespace: tuple[tuple[str, Any], ...]
) -> type[nn.Module]:
    """A class that is both, ``kind`` first, under the original's name.

    It is ``kind`` alone where no class can be both (another metaclass, another layout).
    """
    content: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": f"{kind.__name__}[{original.__qualname__}]",
        "__doc__": kind.__doc__,
        **dict(namespace),
    }
    refusals: dict[str, Any] = {n: _refusal(original, n, hint) for n, hint in REFUSED.items()}
    refusals |= {n: classmethod(_refusal(original, n, FILES)) for n in _REFUSED_OF_CLASS}
    lacking = {n: r for n, r in refusals.items() if hasattr(original, n) and not hasattr(kind, n)}
    try:
        return type(original.__name__, (kind, original), {**content, **lacking})
    except TypeError:
        return type(original.__name__, (kind,), content)


def _refusal(original: type[nn.Module], name: str, hint: str) -> Callable[..., Any]:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise SurgeryError("PSG216", f"a captured {original.__name__} has no {name}()", hint)

    refuse.__name__ = refuse.__qualname__ = name
    return refuse


def _is_plain(value: Any) -> bool:
    """Whether a value neither is nor holds a tensor or a module."""
    if isinstance(value, Tensor | nn.Module):
        return False
    if inspect.ismethod(value):
        return not isinstance(value.__self__, nn.Module)
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    return True
