"""Generation: transformers' own, by a thin shell of the original class over a captured model.

The shell is of the original class, so it prepares inputs, caches and masks in the original's way;
its parts are the captured model's, and its forward is the captured model's call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from ..errors import SurgeryError


def check_generates(module: nn.Module) -> None:
    """PSG212 unless the original is a causal language model that can generate."""
    name = type(module).__name__
    if not isinstance(module, PreTrainedModel) or not module.can_generate():
        raise SurgeryError("PSG212", f"a {name} does not generate", "capture a causal LM")
    if module.config.is_encoder_decoder:
        raise SurgeryError(
            "PSG212",
            f"a captured {name} does not generate: its encoder and decoder are one graph",
            "fold the model, and generate with the original class",
        )


def shell(module: nn.Module, parts: nn.Module, forward: Callable[..., Any]) -> PreTrainedModel:
    """An object of the original's class with other parts, whose call is ``forward``."""
    check_generates(module)
    made = object.__new__(_shell_class(type(module)))
    nn.Module.__init__(made)
    own = vars(made).keys()
    made.__dict__.update({k: v for k, v in vars(module).items() if k not in own})
    made.__dict__.update(_modules=parts._modules, _parameters=parts._parameters, _call=forward)
    return made


@functools.lru_cache(maxsize=64)
def _shell_class(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return vars(self)["_call"](*args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
