"""Which scale a block gets when it is quantised again: the one that it had, or that of its values.

With the scale that it had, what did not change stays what it was, and nothing gets further from
what is meant; but values that grew beyond it would be cut off. So the one that is nearer is taken.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from peftsurgery.checkpoint.arrays import Array


def nearer_scales(
    blocks: Array, kept: Array, fresh: Array, rounded: Callable[[Array], Array]
) -> Array:
    """Of two scales for each row of ``blocks``, the one that it comes nearer with.

    ``rounded`` gives the numbers that can be kept for those of a scale of one.
    """
    errors = []
    for scale in (kept, fresh):
        mine = scale.astype(np.float32)[:, None]
        error = rounded(blocks * inverse(mine)) * mine
        error -= blocks
        errors.append(np.einsum("ij,ij->i", error, error))
    return np.where(errors[0] <= errors[1], kept, fresh)


def inverse(scale: Array) -> Array:
    """One over each scale; one where that is none."""
    found: Array = 1 / np.where(scale > 0, scale, 1).astype(np.float32)
    return found
