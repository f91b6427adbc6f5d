"""Folded weights, one at a time: computed exactly, rounded once, with the rounding error.

The new weight is computed in fp32 (fp64 for a model in fp64) from the stored one, cut by cut, and
rounded once, after the last of them; then its fp32 is let go. Where a rule folds each row of a
weight by itself, so is it done, a few rows at a time: beside what is written, a fold needs the
memory of one weight in fp32 and little more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from peftsurgery.anatomy import Placed
from peftsurgery.anatomy.made_weights import made_of
from peftsurgery.capture.names import join
from peftsurgery.checkpoint.row_wise import row_axes, row_size
from peftsurgery.errors import SurgeryError
from peftsurgery.language.environment import Environment
from peftsurgery.language.readings import fold as folded
from peftsurgery.language.readings import names_in
from peftsurgery.surgery.fourbit.pack import PackedWeight
from peftsurgery.surgery.fourbit.requantise import Gap, gap_between, in_blocks
from peftsurgery.surgery.plan.cut import Cut, in_order
from peftsurgery.surgery.rewrite.computed_weights import solved
from peftsurgery.surgery.rewrite.environment import TensorDomain, environment
from peftsurgery.surgery.rewrite.layout import disorient, wide_dtype
from peftsurgery.surgery.rewrite.readers import check_readers

BLOCKS = 64  # of a large weight; each needs a few times its own memory while it is computed
SMALL = 2**18  # elements that are computed at once, whatever the weight

Weights = dict[str, torch.Tensor]
KnownAxes = dict[Any, dict[str, int] | None]
"""What :func:`row_axes` said, by operation, rule and groups."""


@dataclass(frozen=True)
class FoldedWeight:
    """One folded weight: its names, rounded value and rounding error."""

    names: tuple[str, ...]
    value: torch.Tensor
    gap: Gap


@dataclass(frozen=True)
class Foldable:
    """What a fold reads of a model.

    ``active`` are the cuts of the active adapters, ``sites`` all those of their capture. ``dense``
    gives a weight of the base as a call reads it, ``parameter`` a parameter, by name. ``whole``
    names the weights to be given whether or not a cut changes them, ``stored`` those that are kept
    packed; ``aliases`` gives the further names of a tied weight.
    """

    active: Collection[Cut]
    sites: Iterable[Placed]
    dense: Callable[[str], torch.Tensor]
    parameter: Callable[[str], torch.Tensor]
    whole: Collection[str]
    stored: Mapping[str, PackedWeight]
    aliases: Callable[[str], Iterable[str]]


@torch.no_grad()
def folded_weights(model: Foldable, requantise: bool = False) -> Iterator[FoldedWeight]:
    """Yield each changed weight, rounded to its dtype, with the rounding error.

    With ``requantise`` the error of a packed weight is that of packing it again.
    """
    for name, exact, dtype in exact_weights(model):
        stored = model.stored.get(name) if requantise else None
        value, gap = _rounded(name, exact, dtype, stored)
        yield FoldedWeight((name, *model.aliases(name)), value, gap)


@torch.no_grad()
def exact_weights(
    model: Foldable, widen: Callable[[torch.dtype], torch.dtype] = wide_dtype
) -> Iterator[tuple[str, torch.Tensor, torch.dtype]]:
    """Yield each changed weight by its name: its exact value, not rounded, and its stored dtype.

    ``widen`` gives the dtype that changes of a weight are added in, by the stored one; what is only
    trained stays in its own.
    """
    cuts, axes = fold_cuts(model), KnownAxes()
    for names, mine in _by_weight(cuts, model.whole):
        exact = {name: model.dense(name) for name in names}
        dtypes = {name: value.dtype for name, value in exact.items()}
        for name in names if mine else ():
            exact[name] = exact[name].to(widen(dtypes[name]), copy=True)
        changed = {name for cut in mine for name in _fold_cut(model, cut, exact, axes)}
        for name in names:
            if name in changed or name in model.whole:
                yield name, exact.pop(name), dtypes[name]


def fold_cuts(model: Foldable) -> list[Cut]:
    """Active cuts that change weights, in the order in which they are folded.

    PSG401 for one that cannot be folded, PSG408 for a weight that something else reads too.
    """
    check_readers(model.active, model.sites)
    cuts = [cut for cut in in_order(model.active) if cut.rule.rewrite]
    for cut in cuts:
        _check_foldable(cut)
    return cuts


def _by_weight(
    cuts: Iterable[Cut], others: Iterable[str]
) -> Iterable[tuple[Iterable[str], Collection[Cut]]]:
    """The weights that are folded together, and the cuts that fold them, in order.

    A layer that is called twice has one weight, which is folded once. ``others`` are weights to be
    written with or without a cut.
    """
    groups: dict[str, tuple[dict[str, None], dict[Any, Cut]]] = {n: ({n: None}, {}) for n in others}
    for cut in cuts:
        names, made = dict.fromkeys(cut.held), dict[Any, Cut]()
        for known, earlier in (groups[name] for name in cut.held if name in groups):
            names, made = known | names, earlier | made
        key = (cut.operation, id(cut.rule), cut.site.slice, *cut.weights.items(), *cut.made.items())
        made.setdefault(key, cut)
        groups |= dict.fromkeys(names, (names, made))
    together = {id(group): group for group in groups.values()}
    return [(names, made.values()) for names, made in together.values()]


def _fold_cut(model: Foldable, cut: Cut, exact: Weights, axes: KnownAxes) -> Collection[str]:
    """Apply one cut's fold to the ``exact`` weights, in place; returns which it changed."""
    names, rule = cut.weights, cut.rule
    dtype = exact[cut.held[0]].dtype

    def read(full: str) -> torch.Tensor:
        if full in exact:
            return exact[full]
        return check_finite(full, model.parameter(full).detach()).to(dtype)

    env = environment(cut, TensorDomain(read))
    bound = (*names, *cut.made)
    seen = {name: env[name] for name in bound}
    for rows, part in _blocks(cut, env, seen, axes):
        for name, value in folded(rule, part).items():
            if name in bound:
                seen[name][rows] = value.clone() if _is_shared(value, seen[name]) else value
            elif torch.as_tensor(value).any():  # `b * s` is nothing where there is no bias
                raise SurgeryError(
                    "PSG405",
                    f"{cut.operation.name} folds into a bias, and {cut.placed.module} has none",
                    "add a bias to the model, or keep the adapter",
                )
    for name in rule.fold.keys() & names:
        if not _is_shared(seen[name], exact[names[name]]):
            exact[names[name]] = disorient(exact[names[name]], cut.site, name, seen[name])
    changed = {names[name] for name in rule.fold.keys() & names}
    for name in rule.fold.keys() & cut.made:
        new = _solved(cut, name, disorient(None, cut.site, name, seen[name]), read)
        exact |= new
        changed |= new.keys()
    return changed


def _solved(
    cut: Cut, name: str, target: torch.Tensor, read: Callable[[str], torch.Tensor]
) -> Weights:
    """The parameters, by name, that make a computed weight what it is to be. PSG424."""
    block = cut.placed.block

    def full(node: fx.Node) -> str:
        return join(block, str(node.target))

    own = made_of(cut.site)[name]
    found = solved(cut.site.nodes[name], target, lambda node: read(full(node)), own)
    if found is None:
        raise SurgeryError(
            "PSG424",
            f"'{cut.operation.name}' cannot be folded at '{cut.placed.module}': its weight is "
            f"computed of {', '.join(cut.made[name])}, none of whose values make the new one",
            "leave it out with `where:`, or keep the adapter",
        )
    return {full(node): value for node, value in found.items()}


def _blocks(
    cut: Cut, env: Mapping[str, Any], seen: Weights, known: KnownAxes
) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """Split a cut's weights into row blocks, each with the environment its fold reads."""
    largest = max(seen.values(), key=torch.numel)
    count = min(BLOCKS, largest.numel() // SMALL)
    key = (cut.operation, id(cut.rule), cut.numbers.get("groups"))
    if count > 1 and key not in known:
        known[key] = row_axes(cut.rule, cut.numbers)
    axes, rows = known[key] if count > 1 else None, cut.numbers.get(str(row_size(cut.rule)))
    if axes is None or rows is None or any(weight.shape[0] != rows for weight in seen.values()):
        yield ..., env
        return
    axes, step = {**axes, **dict.fromkeys(cut.rule.kind.weights, 0)}, -(-rows // count)
    for start in range(0, rows, step):
        end = min(start + step, rows)
        yield slice(start, end), _some_rows(env, axes, start, end)


def _some_rows(
    env: Mapping[str, Any], axes: Mapping[str, int], start: int, end: int
) -> Mapping[str, Any]:
    """What is bound, with rows ``start`` to ``end`` of what has rows along one of these axes."""

    def cut(name: str) -> Any:
        value = env[name]
        is_long = name in axes and isinstance(value, torch.Tensor)
        return value.narrow(axes[name], start, end - start) if is_long else value

    return Environment({}, dict.fromkeys(env, cut))


def _is_shared(value: Any, other: torch.Tensor) -> bool:
    """Whether two tensors are in the same memory."""
    is_tensor = isinstance(value, torch.Tensor)
    return is_tensor and value.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _check_foldable(cut: Cut) -> None:
    if not cut.rule.fold:
        ship = "what it computes is not a change of weights; ship the saved surgery with the base"
        message = f"'{cut.operation.name}' cannot be folded: its rule has no `fold:`"
        hint = ship if cut.operation.file.flat is None else f"{ship}, flatten()ed first"
        raise SurgeryError("PSG401", message, hint)
    read = names_in(cut.rule.fold.values(), cut.rule, cut.numbers)
    for name in sorted(read | cut.rule.fold.keys()):
        node = cut.site.nodes.get(name)
        if node is not None and node.op != "get_attr" and name not in cut.made:
            raise SurgeryError(
                "PSG401",
                f"'{cut.operation.name}' cannot be folded at '{cut.placed.module}': '{name}' is "
                f"computed there ({node.name}), and no weight",
                "let the pattern name the weight itself, or keep the adapter",
            )


def _rounded(
    name: str, exact: torch.Tensor, dtype: torch.dtype, stored: PackedWeight | None
) -> tuple[torch.Tensor, Gap]:
    """Round a weight to its dtype; returns it with the error. Raises PSG402, PSG403."""
    rounded = exact if exact.dtype == dtype else torch.empty_like(exact, dtype=dtype)
    for mine, whole in zip(in_blocks(rounded), in_blocks(exact), strict=True):
        check_finite(name, whole)
        if mine.dtype != whole.dtype and not torch.isfinite(mine.copy_(whole)).all():
            raise SurgeryError("PSG402", f"'{name}' overflows {dtype} once it is folded")
    return rounded.contiguous(), gap_between(exact, rounded, stored)


def check_finite(name: str, value: torch.Tensor) -> torch.Tensor:
    """The tensor, if all of its numbers are finite. PSG403 otherwise."""
    if not torch.isfinite(value).all():
        raise SurgeryError("PSG403", f"'{name}' holds NaN or infinity")
    return value
