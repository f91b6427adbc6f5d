"""Schemes of compressed-tensors: what config.json says of the weight of one module.

    quantization_config: {format, config_groups: {name: {targets, format, weights: {num_bits, type,
    strategy, group_size, block_structure, symmetric, actorder}}}, ignore}

A group's targets are names of modules, regular expressions after "re:" that begin like a name, or
names of classes; the first comes before the second, and that before the third. The package's own
documentation: https://github.com/vllm-project/compressed-tensors, `quantization/quant_args.py`,
`quant_scheme.py`, `quant_config.py`, `utils/match.py` (0.20). No class is known here, and what is
ignored is not asked: the tensors beside a module tell whether it is quantised.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import lcm
from typing import Any

from peftsurgery.checkpoint.arrays import Array
from peftsurgery.checkpoint.codecs.bands import Bands, PartCut
from peftsurgery.checkpoint.codecs.codec import Parts, Said
from peftsurgery.language.paths import full_match

SCHEME = "scheme"
INTS, FLOATS, PACKED = "int", "float", "pack-quantized"
NVFP4, MXFP4 = "nvfp4-pack-quantized", "mxfp4-pack-quantized"
PLAIN = ("int-quantized", "float-quantized", "naive-quantized")
# The bits that are read, by format and kind. Words of other bits were once filled otherwise.
READ: Mapping[str, Mapping[str, Sequence[int]]] = {
    PACKED: {INTS: (2, 4, 8)},
    **{name: {INTS: range(2, 9), FLOATS: (8,)} for name in PLAIN},
    NVFP4: {FLOATS: (4,)},
    MXFP4: {FLOATS: (4,)},
}
STRATEGIES = {INTS: ("tensor", "channel", "group"), FLOATS: ("tensor", "channel", "group", "block")}
OWN_STRATEGIES = {NVFP4: ("tensor_group",), MXFP4: ("group",)}
GROUPED = ("group", "tensor_group")
BY_ORDER = ("group", "dynamic")
# What there is besides of a module that is quantised: scales of activations.
ACTIVATIONS = {
    f"{where} {what}": f".{where}_{what}"
    for where in ("input", "output")
    for what in ("scale", "zero_point", "global_scale")
}


def caches(said: Said) -> tuple[str, ...]:
    """The endings of scales for the cache of an attention, if that is quantised."""
    if not said.get("kv_cache_scheme"):
        return ()
    return tuple(f".{which}_{what}" for which in "qkv" for what in ("scale", "zero_point"))


@dataclass(frozen=True)
class Scheme:
    """How the weight of a module is kept.

    ``group`` is the number of inputs of a group, ``block`` the rows and columns of a block; 0 where
    the strategy has none. ``ordered`` tells whether the groups are those of a calibration's order.
    """

    format: str
    kind: str
    bits: int
    strategy: str
    group: int
    block: tuple[int, int]
    symmetric: bool
    ordered: bool

    def blocks(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The rows and columns of a weight (out, in) that have one scale."""
        out, in_ = shape
        sizes = {"tensor": (out, in_), "channel": (1, in_), "block": self.block}
        return sizes.get(self.strategy, (1, self.group))

    def table(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The rows and columns of scales that a weight (out, in) has. ValueError if it has none.

        Only of blocks may the last be smaller.
        """
        out, in_ = shape
        rows, columns = self.blocks(shape)
        if not out or not in_:
            raise ValueError("it is empty")
        if in_ % columns and self.strategy != "block":
            raise ValueError(f"groups of {columns} do not divide its {in_} inputs")
        return -(-out // rows), -(-in_ // columns)


def refused(said: Said) -> str | None:
    """Why nothing is read of a base that says so of its quantiser; None if something may be."""
    groups, sparse = said.get("config_groups"), said.get("sparsity_config")
    if not isinstance(groups, dict) or not groups:
        return "compressed-tensors without config_groups"
    for name, group in groups.items():
        if not isinstance(group, dict):
            return f"the config group '{name}', which is no object"
    if isinstance(sparse, dict) and sparse.get("format", "dense") != "dense":
        return f"compressed-tensors in the sparse format '{sparse.get('format')}'"
    if said.get("transform_config"):
        return "compressed-tensors with a transform_config: its weights are rotated"
    formats = {str(group.get("format") or said.get("format")) for group in groups.values()}
    if formats.isdisjoint(READ):
        names = " or ".join(f"'{name}'" for name in sorted(formats))
        return f"compressed-tensors in the format {names}; read are {', '.join(READ)}"
    return None


def scheme_reader(
    formats: Collection[str], kind: str
) -> Callable[[str, Said], Mapping[str, Any] | None]:
    """What gives the scheme of a module, None where that is of another format or another kind.

    It raises ValueError that says why none is read.
    """

    def of_module(module: str, said: Said) -> Mapping[str, Any] | None:
        found = scheme_of(module, said)
        return {SCHEME: found} if found.format in formats and found.kind == kind else None

    return of_module


def scheme_of(module: str, said: Said) -> Scheme:
    """The scheme of a module. ValueError that says why none is read."""
    schemes = {_parsed(group, said) for group in _groups_of(module, said["config_groups"])}
    if len(schemes) != 1:
        count = "several config groups" if schemes else "no config group"
        raise ValueError(f"{count} would be its own")
    return schemes.pop()


def _groups_of(module: str, groups: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The groups of weights that may be a module's, of which those by its name come first.

    Where there is one group only, it is that, under whatever name the program knows the module.
    """
    groups = {name: each for name, each in groups.items() if isinstance(each.get("weights"), dict)}
    by_target = {t: each for each in groups.values() for t in _texts(each.get("targets"))}
    if module in by_target:
        return [by_target[module]]
    for target in sorted(by_target):
        if target.startswith("re:") and _begins(target.removeprefix("re:"))(module):
            return [by_target[target]]
    classes = [each for target, each in by_target.items() if target[:1].isupper()]
    return classes or (list(groups.values()) if len(groups) == 1 else [])


@cache
def _begins(pattern: str) -> Callable[[str], bool]:
    """Whether a text begins like a pattern, as the package matches. PSG140, PSG141."""
    return full_match(f"(?:{pattern})(?s:.*)", "quantization_config")


def _texts(values: Any) -> Iterable[str]:
    return (each for each in values or () if isinstance(each, str))


def _parsed(group: Mapping[str, Any], said: Said) -> Scheme:
    """The scheme of a group, with what the package takes where it says nothing. ValueError."""
    weights = group["weights"]
    size = _count(weights.get("group_size") or 0, "group_size")
    inferred = "group" if size > 0 else "channel" if size else "tensor"
    strategy = str(weights.get("strategy") or inferred).lower()
    found = Scheme(
        str(group.get("format") or said.get("format")),
        str(weights.get("type") or INTS).lower(),
        _count(weights.get("num_bits", 8), "num_bits"),
        strategy,
        size if strategy in GROUPED else 0,
        _block(weights.get("block_structure")) if strategy == "block" else (0, 0),
        _flag(weights.get("symmetric", True), "symmetric"),
        str(weights.get("actorder")).lower() in BY_ORDER or weights.get("actorder") is True,
    )
    why = _unread(found)
    if why:
        raise ValueError(why)
    return found


def _unread(scheme: Scheme) -> str | None:
    """Why a scheme is none that is read; None for one that is."""
    what = f"{scheme.kind} of {scheme.bits} bits in '{scheme.format}'"
    if scheme.format not in READ:
        return f"the format '{scheme.format}'; read are {', '.join(READ)}"
    if scheme.bits not in READ[scheme.format].get(scheme.kind, ()):
        allowed = "; ".join(
            f"{kind} of {', '.join(map(str, bits))} bits"
            for kind, bits in READ[scheme.format].items()
        )
        return f"{what}; read are {allowed}"
    strategies = OWN_STRATEGIES.get(scheme.format, STRATEGIES[scheme.kind])
    if scheme.strategy not in strategies:
        return f"{what} with the strategy '{scheme.strategy}'; read are {', '.join(strategies)}"
    if scheme.strategy in GROUPED and scheme.group < 1:
        return f"the strategy '{scheme.strategy}' without a group_size"
    if scheme.kind == FLOATS and not scheme.symmetric:
        return f"{what} that are not symmetric"
    if scheme.kind == FLOATS and scheme.ordered:
        return f"{what} in groups by the order of a calibration"
    return None


def _count(value: Any, name: str) -> int:
    if type(value) is not int:
        raise ValueError(f"{name} is no whole number")
    return value


def _flag(value: Any, name: str) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{name} is neither true nor false")
    return value


def _block(value: Any) -> tuple[int, int]:
    """Rows and columns; the package once wrote them as "128x128"."""
    sizes = value.split("x") if isinstance(value, str) else value
    try:
        rows, columns = (int(each) for each in sizes)
    except (TypeError, ValueError):
        raise ValueError("block_structure is no pair of whole numbers") from None
    if rows < 1 or columns < 1:
        raise ValueError("block_structure is no pair of whole numbers above 0")
    return rows, columns


def own_scheme(said: Said) -> Scheme:
    """The scheme of a weight, of what :func:`scheme_reader` gave."""
    found: Scheme = said[SCHEME]
    return found


def bands_of(scheme: Scheme, shape: tuple[int, ...], **more: PartCut) -> Bands:
    """The bands of a weight (out, in) whose table of scales is cut like it; ``more`` parts are cut.

    With one scale for all of it, what a band becomes depends on the others.
    """
    if scheme.strategy == "tensor":
        return Bands(1, {"weight": PartCut()}, is_closed=True)
    rows, _ = scheme.blocks(shape)
    rows = min(rows, shape[0])
    unit = lcm(rows, *(cut.rows // cut.size for cut in more.values()))
    return Bands(unit, {"weight": PartCut(), "scale": PartCut(0, 1, rows), **more})


def checked_scales(scale: Array, table: tuple[int, int]) -> None:
    """Refuse scales that are no table of such a size. ValueError."""
    shapes = {table, table[:1]} if table[1] == 1 else {table}
    shapes |= {(), (1,), (1, 1)} if table == (1, 1) else set()
    if scale.shape not in shapes:
        raise ValueError(f"weight_scale is {list(scale.shape)}, not {list(table)}")


def has_parts(parts: Parts, **dtypes: Iterable[Any]) -> None:
    """Refuse parts that are kept in other dtypes than in these. ValueError."""
    for name, allowed in dtypes.items():
        if name in parts and parts[name].dtype not in tuple(allowed):
            raise ValueError(f"{name} is kept in {parts[name].dtype}")
