"""Generation: transformers' own, by a shell of the original class over a captured model.

The shell has the original's class, config and settings, so inputs, masks and caches are prepared,
beams are reordered and tokens chosen in the original's way. Its parts are the captured model's, and
calling it is calling the captured model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from ..errors import SurgeryError
from .signature import takes

PAST = "past_key_values"  # the name of the cache in every model that takes a DynamicCache


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
    """Whether the model makes itself a cache like other language models, when asked to use one."""
    return (
        isinstance(module, PreTrainedModel)
        and module.can_generate()
        and not module.config.is_encoder_decoder
        and module._supports_default_dynamic_cache()
        and takes(module, PAST)
    )


def new_cache(module: PreTrainedModel) -> DynamicCache:
    """An empty cache as the model, or its ``generate``, makes one."""
    return DynamicCache(config=module.config.get_text_config(decoder=True))


def shell(module: nn.Module, parts: nn.Module, call: Callable[..., Any]) -> PreTrainedModel:
    """An object of ``module``'s class with other parts, which is called by ``call``. PSG212."""
    original = check_generates(module)
    kind: Any = type(original)
    made: Any = object.__new__(_shell_class(kind))
    nn.Module.__init__(made)
    own = frozenset(vars(made))
    made.__dict__.update({name: v for name, v in vars(original).items() if name not in own})
    made.__dict__.update(_modules=parts._modules, _parameters=parts._parameters, _call=call)
    return made


@functools.lru_cache(maxsize=64)
def _shell_class(kind: Any) -> Any:
    @functools.wraps(kind.forward)  # generate asks what a forward takes
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


class _Prepared(BaseException):
    """Ends a generation at its first call, with what it was called with."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        super().__init__()
        self.inputs = inputs


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
