"""Everything that a model is, as a value: equal before and after what must not change it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


def state_of(module: nn.Module) -> dict[str, Any]:
    """Every attribute of every module: tensors by value and identity, the rest as it is."""
    found: dict[str, Any] = {}
    for name, part in module.named_modules():
        found[f"{name}()"] = type(part)
        for key, value in vars(part).items():
            found[f"{name}:{key}"] = _plain(value)
    if isinstance(module, PreTrainedModel):
        found["config"] = module.config.to_dict()
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        content = value.detach().clone().numpy().tobytes()
        return id(value), value.requires_grad, id(value.grad), content
    if isinstance(value, dict):
        return [(key, _plain(each)) for key, each in value.items()]
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, bool | int | float | str | set) else id(value)
