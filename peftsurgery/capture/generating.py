"""Generation: transformers' own, by a shell of the original class over a captured model.

The shell has the original's class, config and settings, so inputs, masks and caches are prepared,
beams are reordered and tokens chosen in the original's way. Its parts are the captured model's, and
calling it is calling the captured model.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel

from peftsurgery.capture.signature import arguments_of
from peftsurgery.errors import SurgeryError
from peftsurgery.quiet import quiet


def check_generates(module: nn.Module) -> PreTrainedModel:
    """The module, if it is a causal language model that can generate. PSG212 if not."""
    name = type(module).__name__
    if not isinstance(module, PreTrainedModel) or not module.can_generate():
        hint = "capture a causal language model of transformers, one that ends in ForCausalLM"
        raise SurgeryError("PSG212", f"a {name} cannot generate", hint)
    if module.config.is_encoder_decoder:
        raise SurgeryError(
            "PSG212",
            f"a captured {name} does not generate: its encoder and its decoder are one graph",
            "fold it, and generate with the plain model; a method that does not fold is decoded by "
            "calling the model with decoder_input_ids",
        )
    return module


def remembers(module: nn.Module) -> bool:
    """Whether the model creates its own cache when it is called with ``use_cache=True``."""
    return (
        isinstance(module, PreTrainedModel)
        and module.can_generate()
        and not module.config.is_encoder_decoder
        and module._supports_default_dynamic_cache()
    )


def cache_argument(module: nn.Module) -> str | None:
    """The name of the forward's argument that takes a cache, or None if there is none.

    It is one that the forward of ``module`` or of some part of it declares to be a ``Cache``: the
    name differs between models and versions of transformers, and some declare only the part's.
    """
    declared = {name for kind in set(map(type, module.modules())) for name in _caches_of(kind)}
    return next((name for name in arguments_of(module) if name in declared), None)


@functools.lru_cache(maxsize=1024)
def _caches_of(kind: type[nn.Module]) -> tuple[str, ...]:
    """The arguments of the forward of a class of modules that are declared as caches."""
    try:
        parameters = inspect.signature(kind.forward, eval_str=True).parameters
    except (NameError, TypeError, ValueError):  # an annotation that names what is not imported
        return ()
    return tuple(name for name, p in parameters.items() if _is_cache_type(p.annotation))


def _is_cache_type(annotation: Any) -> bool:
    return any(
        isinstance(kind, type) and issubclass(kind, Cache)
        for kind in (annotation, *get_args(annotation))
    )


def new_cache(module: PreTrainedModel) -> DynamicCache:
    """An empty cache as the model, or its ``generate``, makes one."""
    return DynamicCache(config=module.config.get_text_config(decoder=True))


def shell(module: nn.Module, parts: nn.Module, call: Callable[..., Any]) -> PreTrainedModel:
    """An object of ``module``'s class with other parts, which is called by ``call``. PSG212.

    What the parts have of its settings (a generation config of their own) is theirs.
    """
    original = check_generates(module)
    kind: Any = type(original)
    made: Any = object.__new__(_shell_class(kind))
    nn.Module.__init__(made)
    own = frozenset(vars(made))
    settings = {**vars(original), **{n: v for n, v in vars(parts).items() if n in vars(original)}}
    made.__dict__.update({name: v for name, v in settings.items() if name not in own})
    made.__dict__.update(_modules=parts._modules, _parameters=parts._parameters, _call=call)
    return made


@functools.lru_cache(maxsize=64)
def _shell_class(kind: Any) -> Any:
    @functools.wraps(kind.forward)  # generate asks what a forward takes
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


class _Prepared(BaseException):
    """Stops a generation at its first forward call, and carries that call's arguments."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        super().__init__()
        self.inputs = inputs


@quiet()
def first_inputs(module: nn.Module) -> dict[str, Any]:
    """What the first call of a generation gives for two prompts, one of them padded. PSG212."""

    def stop(**inputs: Any) -> Any:
        raise _Prepared(inputs)

    original = check_generates(module)
    parts = nn.ParameterDict({"any": torch.empty(0, dtype=original.dtype)})  # not on meta
    tokens = torch.ones(2, 8, dtype=torch.long)
    mask = torch.ones_like(tokens)
    mask[0, 0] = 0
    settings = {"use_cache": True, "cache_implementation": None, "max_new_tokens": 1}
    try:
        shell(original, parts, stop).generate(tokens, attention_mask=mask, **settings)
    except _Prepared as prepared:
        return prepared.inputs
    raise AssertionError("generate returned without a call")
