"""measure_change: how far one tensor is from another, and what that looks like.

The singular values of the difference come of a random sketch that grows while it finds more than
noise would give it (Halko, Martinsson and Tropp, 2011, arXiv:0909.4061): a folded adapter of rank r
costs a sketch of a few times r columns, and a dense change the first sketch alone.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

FIRST_SKETCH = 16
_EXPONENT = {torch.float32: 8, torch.float64: 11}
"""How many bits of a number are its exponent."""
LOW = 0.25
"""A rank is low up to this share of the smaller dimension."""


@dataclass(frozen=True)
class Change:
    """What became of a tensor.

    ``relative`` is the norm of the change over that of the first tensor; ``ulps`` the largest
    change in units of the last place of the coarser dtype; ``sign_flips`` a share of the elements.
    ``rank`` is the numerical rank of the change if it is low; ``stable_rank`` its squared Frobenius
    norm over its largest squared singular value, of which ``top_share`` is the inverse; both are
    None unless the tensor has two dimensions and no NaN. ``not_finite`` counts NaN and Inf of both.
    """

    verdict: str
    relative: float = 0.0
    largest: float = 0.0
    ulps: float = 0.0
    sign_flips: float = 0.0
    not_finite: tuple[int, int] = (0, 0)
    rank: int | None = None
    stable_rank: float | None = None
    top_share: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The measures by name."""
        return asdict(self)


def measure_change(a: Tensor, b: Tensor) -> Change:
    """The change from ``a`` to ``b``, which have one shape and any dtypes."""
    if not (a.is_floating_point() and b.is_floating_point()):
        same = torch.equal(a, b)
        flips = 0.0 if same or not a.numel() else (a != b).double().mean().item()
        return Change("identical") if same else Change("dense", relative=flips)
    eps = max(torch.finfo(each.dtype).eps for each in (a, b))
    wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    one, other = a.to(wide), b.to(wide)
    if torch.equal(one, other):
        return Change("identical")
    delta = other - one
    norm, length = float(one.norm()), float(delta.norm())
    if not math.isfinite(length):  # a NaN or Inf of either is one of the difference
        counts = [int((~torch.isfinite(each)).sum()) for each in (one, other)]
        if any(counts):
            return Change("not finite", not_finite=(counts[0], counts[1]))
    ulps = float((delta.abs() / _ulp(torch.maximum(one.abs(), other.abs()), eps)).max())
    rounded = ulps <= 1
    noise = eps * float(other.norm()) / 2
    spectrum = None if rounded or delta.dim() != 2 else _spectrum(delta, noise)
    rank = None if spectrum is None else spectrum[0]
    return Change(
        verdict="rounding" if rounded else "low-rank" if rank is not None else "dense",
        relative=length / norm if norm else float("inf"),
        largest=float(delta.abs().max()),
        ulps=ulps,
        sign_flips=int(torch.count_nonzero(one * other < 0)) / one.numel(),
        rank=rank,
        stable_rank=None if spectrum is None else length**2 / spectrum[1] ** 2,
        top_share=None if spectrum is None else spectrum[1] ** 2 / length**2,
    )


def _ulp(size: Tensor, eps: float) -> Tensor:
    """The distance of neighbouring numbers at each size, of a dtype with this ``eps``."""
    info, bits = torch.finfo(size.dtype), torch.int32 if size.itemsize == 4 else torch.int64
    # a number with its fraction's bits taken away is the power of two below it
    mask = -(1 << (8 * size.itemsize - _EXPONENT[size.dtype] - 1))
    below = size.clamp_min(info.tiny).view(bits).bitwise_and_(mask).view(size.dtype)
    return below.mul_(eps)


def _spectrum(delta: Tensor, noise: float) -> tuple[int | None, float]:
    """The rank of a change if it is low, and its largest singular value.

    ``noise`` bounds the norm of what rounding the tensor did to it: what is not above that is no
    part of the rank.
    """
    rows, columns = delta.shape
    smaller, whole = min(rows, columns), float(delta.norm()) ** 2
    generator = torch.Generator().manual_seed(0)
    width = min(FIRST_SKETCH, smaller)
    while True:
        random = torch.randn(columns, width, generator=generator, dtype=delta.dtype)
        basis = torch.linalg.qr(delta @ random).Q
        values = torch.linalg.svdvals(basis.T @ delta)
        held = float(values.norm()) ** 2
        # the largest singular value of rounding errors that have this norm together
        apart = noise * (rows**0.5 + columns**0.5) / (rows * columns) ** 0.5
        floor = max(apart, float(values[0]) * 1e-5)
        rank = int((values > floor).sum())
        if rank < width or width == smaller:
            return (rank if rank <= LOW * smaller else None), float(values[0])
        if held < 4 * whole * width / smaller or width > LOW * smaller:
            return None, float(values[0])
        width = min(4 * width, smaller)
