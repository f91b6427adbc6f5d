"""Random draws: which operators make them, and generators restored after a trial run."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from peftsurgery.capture.schemas import bind

# The names that ATen schemas give to a train flag, and to the dropout of an attention core.
TRAIN_FLAGS = frozenset({"train", "training", "use_input_stats", "dropout_p"})
RATE = "p"  # of a dropout, in ATen's schemas and in torch's modules


def train_flags(target: Any) -> frozenset[str]:
    """The names of the operator's arguments that tell training from evaluation."""
    return TRAIN_FLAGS.intersection(bind(target, (), {}))


def is_random(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of an operator draws random numbers: attention without dropout does not."""
    given = bind(target, args, kwargs)
    flags = [given[name] for name in train_flags(target)]
    draws = torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
    return draws and (not flags or any(flags))


# Both Python and numpy draw from a Mersenne twister. A word of all zeros or of all ones is what it
# makes of these two words of its state.
_LEAST, _MOST = 0, 0x12DD9BB3
_WORDS = 624


def starts() -> list[tuple[int, ...]]:
    """Generator states to test with: one draws the smallest numbers, one the largest.

    A choice by a threshold differs between these two. Eight others draw pseudo-random numbers, so
    that most other choices differ too. Extremes fill half a state only: a method that rejects them
    reaches the numbers behind.
    """
    draw = random.Random(0)
    extremes = ([word] * (_WORDS // 2) for word in (_LEAST, _MOST))
    heads = [*extremes, *([] for _ in range(8))]
    return [
        (*head, *(draw.getrandbits(32) for _ in range(_WORDS - len(head))), 0) for head in heads
    ]


@contextmanager
def kept_generators(start: tuple[int, ...] | None = None) -> Iterator[None]:
    """Restore the state of every random generator on leaving the context.

    With a ``start``, generators of Python and numpy start there.
    """
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            if start is not None:
                random.setstate((3, start, None))
                np.random.set_state(("MT19937", np.array(start[:-1], np.uint32), start[-1], 0, 0.0))
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def drawn_elsewhere() -> bytes:
    """Pickled state of Python's and numpy's generators; it changes with every draw."""
    return pickle.dumps((random.getstate(), np.random.get_state()))
