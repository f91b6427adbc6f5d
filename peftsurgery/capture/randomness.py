"""Whether code draws random numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from .signature import Call, map_tensors

# The names that ATen schemas give to a train flag, and to the dropout of an attention core.
TRAIN_FLAGS = frozenset({"train", "training", "use_input_stats", "dropout_p"})
RATE = "p"  # of a dropout, in ATen's schemas and in torch's modules


def train_flags(target: Any) -> frozenset[str]:
    """The names of the operator's arguments that tell training from evaluation."""
    if not isinstance(target, torch._ops.OpOverload):
        return frozenset()
    return TRAIN_FLAGS & {argument.name for argument in target._schema.arguments}


def is_random(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of an operator draws random numbers: attention without dropout does not."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    names = [argument.name for argument in target._schema.arguments]
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    defaults = {a.name: a.default_value for a in target._schema.arguments if a.has_default_value()}
    flags = [given.get(name, defaults.get(name)) for name in train_flags(target)]
    return torch.Tag.nondeterministic_seeded in target.tags and (not flags or any(flags))


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
        self.seen |= is_random(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))
