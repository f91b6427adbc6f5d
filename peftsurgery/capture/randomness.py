"""Whether code draws random numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from .signature import Call, map_tensors


def is_random(target: Any) -> bool:
    """Whether an operator draws random numbers."""
    return (
        isinstance(target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in target.tags
    )


def is_random_in(module: nn.Module, call: Call) -> bool:
    """Whether ``module``, as it is now, draws random numbers for a call. No value is computed."""
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, _Watch() as watch:
        module(**map_tensors(call, fake.from_tensor).tensors)
    return watch.seen


class _Watch(TorchDispatchMode):
    """Notes whether an operator that draws random numbers was called."""

    seen = False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.seen |= is_random(func)
        return func(*args, **(kwargs or {}))
