"""Whether code draws random numbers, and generators kept as they are while it is looked at."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

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


@contextmanager
def kept_generators(shift: int = 0) -> Iterator[None]:
    """Within the context numbers are drawn; behind it, every generator is where it was before.

    With another ``shift``, generators of Python and numpy give other numbers within.
    """
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            for _ in range(shift):
                random.random()
                np.random.random_sample()
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def drawn_elsewhere() -> bytes:
    """A value that changes when numbers are drawn from Python's generator or numpy's."""
    return pickle.dumps((random.getstate(), np.random.get_state()))
