"""LoHa and LoKr of LyCORIS, as peft has them (Yeh et al., 2024, arXiv:2309.14859).

    LoHa: scale * (w1_a w1_b) * (w2_a w2_b), element by element
    LoKr: scale * kron(w1, w2), each whole or a product of two

Of a kernel, the last factor has the taps too, or a core (Tucker) stands between the two:
``w1[o, c, k, l] = sum(t1[i, j, k, l] w1_a[i, o] w1_b[j, c])``. peft's config says of all modules at
once whether there are cores, and by one number how the sides of a Kronecker product are divided.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from peftsurgery.checkpoint.arrays import Array
from peftsurgery.checkpoint.lora_folder import NewTensors, said_ranks
from peftsurgery.errors import SurgeryError
from peftsurgery.formats.foreign.library import foreign_words
from peftsurgery.formats.foreign.reading import ForeignValues
from peftsurgery.formats.foreign.target import ForeignTarget

CORES = ("t1", "t2")


def hadamard(values: ForeignValues, name: str, target: ForeignTarget) -> NewTensors:
    """The tensors of LoHa, with the scale in ``w1_a``. PSG507, PSG520."""
    _check(values, target, name)
    parts = values.parts(name)
    _need(values, name, parts, ("w1_a", "w1_b", "w2_a", "w2_b"))
    out, into, *taps = target.sizes
    rank, has_core = len(parts["w1_b"]), any(core in parts for core in CORES)
    if has_core:
        _need(values, name, parts, CORES)
    _check_cores(values, name, taps, has_core)
    fitted = dict[str, Array]()
    for one in ("1", "2"):
        shapes = _factor_shapes(one, rank, (out, into, *taps), has_core)
        fitted |= {part: _fit(name, part, parts[part], shape) for part, shape in shapes.items()}
    fitted["w1_a"] = fitted["w1_a"] * np.float32(values.scale(name, target.path, rank))
    return _named(values, target, rank, fitted)


def kronecker(values: ForeignValues, name: str, target: ForeignTarget) -> NewTensors:
    """The tensors of LoKr, with the scale in ``w1``, which is multiplied out. PSG507, PSG520.

    peft has ``w2`` as a product where its rank is below half of its longer side, and whole else.
    The scale of two whole matrices is 1, whatever alpha there is, as in LyCORIS.
    """
    _check(values, target, name)
    parts = values.parts(name)
    lows = [side for side in ("w1", "w2") if side not in parts]
    _need(values, name, parts, [f"{side}_{half}" for side in lows for half in "ab"])
    for side in {"w1", "w2"} - {*lows}:
        if more := parts.keys() & {f"{side}_a", f"{side}_b", f"t{side[1:]}"}:
            raise SurgeryError(
                "PSG507", f"'{name}' has {side} whole, and {', '.join(sorted(more))}"
            )
    ranks = {len(parts[f"{side}_b"]) for side in lows}
    if len(ranks) > 1:
        raise SurgeryError("PSG507", f"'{name}' has factors of ranks {sorted(ranks)}")
    rank = next(iter(ranks), 0)
    first = _first(name, parts, rank)
    (out, into, *taps), (rows, columns) = target.sizes, first.shape
    if out % rows or into % columns:
        message = f"'{name}' has a first matrix of {list(first.shape)}"
        raise SurgeryError("PSG507", f"{message}, and its weight is {list(target.shape)}")
    sizes = (out // rows, into // columns, *taps)
    scale = values.scale(name, target.path, rank) if rank else 1.0
    second = _second(values, name, parts, rank, sizes)
    if second.keys() == {"w2"} and len(sizes) == 3:
        message = f"'{name}' has a second matrix that is whole, for a convolution along one axis"
        raise SurgeryError("PSG520", message, "peft (0.21) multiplies these in another order")
    longest = max(sizes[:2])
    said = rank if "w2_b" in second else -(-longest // 2)
    return _named(values, target, said, {"w1": first * np.float32(scale), **second})


def _first(name: str, parts: Mapping[str, Array], rank: int) -> Array:
    """The first matrix of a Kronecker product, multiplied out."""
    if "w1" not in parts:
        rows, columns = len(parts["w1_a"]), parts["w1_b"].size // rank
        low = _fit(name, "w1_a", parts["w1_a"], (rows, rank)).astype(np.float64)
        value: Array = low @ _fit(name, "w1_b", parts["w1_b"], (rank, columns))
    else:
        value = parts["w1"]
    if value.ndim != 2 or not value.size:
        raise SurgeryError("PSG507", f"'{name}' has a first matrix of {list(value.shape)}")
    return value.astype(np.float32)


def _second(
    values: ForeignValues, name: str, parts: Mapping[str, Array], rank: int, sizes: tuple[int, ...]
) -> dict[str, Array]:
    """The second matrix of a Kronecker product, as peft has it at this rank."""
    if "w2" in parts:
        return {"w2": _fit(name, "w2", parts["w2"], sizes)}
    has_core = "t2" in parts
    shapes = _factor_shapes("2", rank, sizes, has_core)
    fitted = {part: _fit(name, part, parts[part], shape) for part, shape in shapes.items()}
    if 2 * rank < max(sizes[:2]):
        _check_cores(values, name, sizes[2:], has_core)
        return fitted
    wide = {part: value.astype(np.float64) for part, value in fitted.items()}
    if has_core:
        core = wide["t2"].reshape(rank, rank, -1)
        whole = np.einsum("ijk,ip,jr->prk", core, wide["w2_a"], wide["w2_b"])
    else:
        whole = wide["w2_a"] @ wide["w2_b"]
    return {"w2": whole.reshape(sizes).astype(np.float32)}


def _factor_shapes(
    one: str, rank: int, sizes: tuple[int, ...], has_core: bool
) -> dict[str, tuple[int, ...]]:
    """The shapes of the factors of a matrix or kernel (out, in, taps) in peft."""
    out, into, *taps = sizes
    if has_core:
        core = (rank, rank, *taps, *([1] * (2 - len(taps))))
        return {f"w{one}_a": (rank, out), f"w{one}_b": (rank, into), f"t{one}": core}
    return {f"w{one}_a": (out, rank), f"w{one}_b": (rank, into * math.prod(taps))}


def _fit(name: str, part: str, value: Array, shape: tuple[int, ...]) -> Array:
    """A value in this shape: kernels are written with their taps apart or together. PSG507."""
    if value.size != math.prod(shape) or not value.ndim or value.shape[0] != shape[0]:
        message = f"{part} of '{name}' is {list(value.shape)}"
        raise SurgeryError("PSG507", f"{message}, where its weight needs {list(shape)}")
    return value.reshape(shape)


def _need(
    values: ForeignValues, name: str, parts: Mapping[str, Array], wanted: Sequence[str]
) -> None:
    for part in wanted:
        if part not in parts:
            raise SurgeryError("PSG507", f"'{name}' has no '{values.names.spelling.suffix(part)}'")
        if not parts[part].ndim or not parts[part].size:
            raise SurgeryError("PSG507", f"'{name}' is of rank 0")


def _check(values: ForeignValues, target: ForeignTarget, name: str) -> None:
    if target.is_table or target.is_turned:
        message = f"'{name}' is for '{target.path}', which is no linear and no convolution of torch"
        raise SurgeryError("PSG520", message, "peft has no such adapters of it")


def _check_cores(values: ForeignValues, name: str, taps: Sequence[int], has_core: bool) -> None:
    """Refuse what differs from other kernels: all or none have cores in peft. PSG520."""
    has_taps = any(size > 1 for size in taps)
    if has_core and not has_taps:
        raise SurgeryError("PSG520", f"'{name}' has a core, and no kernel of several taps")
    if has_taps and not has_core and any(values.any_has(core) for core in CORES):
        message = f"'{name}' has no core, and other kernels have one"
        raise SurgeryError("PSG520", message, "in peft all kernels of an adapter have one, or none")


def _named(
    values: ForeignValues, target: ForeignTarget, rank: int, parts: Mapping[str, Array]
) -> NewTensors:
    suffix = values.names.spelling.suffix
    return NewTensors(target.path, rank, {suffix(part): value for part, value in parts.items()})


def hadamard_config(
    layers: Sequence[NewTensors], targets: Sequence[ForeignTarget], ranks: Mapping[str, int]
) -> dict[str, Any]:
    """The config of an adapter of LoHa."""
    return _config("hadamard", layers, ranks)


def kronecker_config(
    layers: Sequence[NewTensors], targets: Sequence[ForeignTarget], ranks: Mapping[str, int]
) -> dict[str, Any]:
    """The config of an adapter of LoKr. PSG520 if no one number divides the sides as they are."""
    sides: dict[tuple[int, int], str] = {}
    for layer, target in zip(layers, targets, strict=True):
        small = next(value.shape for value in layer.tensors.values())
        for size, part in zip(target.sizes[:2], small, strict=True):
            sides.setdefault((size, part), layer.module)
    candidates = sorted({-1, *(n for size, part in sides for n in (part, size // part))})
    fitting = [n for n in candidates if all(_small(size, n) == part for size, part in sides)]
    if not fitting:
        (size, part), module = next(iter(sides.items()))
        message = f"'{module}' divides {size} by {part}, and no factor does so in all modules"
        raise SurgeryError("PSG520", message, "peft has one `decompose_factor` for an adapter")
    return {**_config("kronecker", layers, ranks), "decompose_factor": fitting[0]}


def _small(size: int, factor: int) -> int:
    """The smaller side that peft (0.21) divides a size into: its ``factorization``."""
    if factor > 0 and size % factor == 0:
        return factor
    most = min(math.isqrt(size), factor if factor > 0 else size)
    return max(each for each in range(1, most + 1) if size % each == 0)


def _config(kind: str, layers: Sequence[NewTensors], ranks: Mapping[str, int]) -> dict[str, Any]:
    names = {name for layer in layers for name in layer.tensors}
    cores = any(name.endswith(CORES) for name in names)
    said: dict[str, Any] = foreign_words()["configs"][kind]
    return {**said, **said_ranks(ranks, "alpha"), "use_effective_conv2d": cores}
