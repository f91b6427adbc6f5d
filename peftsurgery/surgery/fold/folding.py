"""fold: the operations of a model made part of its weights.

The new weight is computed in fp32 (fp64 for a model in fp64) from the stored one, cut by cut, and
rounded once. A tied weight of which one side was adapted is untied, or the fold is refused: it is
never silently shared.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from peftsurgery.arguments import checked
from peftsurgery.capture import GraphModel
from peftsurgery.capture.tensors import named_tensors, tensor_names
from peftsurgery.capture.threads import making
from peftsurgery.errors import SurgeryError
from peftsurgery.language import fold as folded_weights
from peftsurgery.language import names_in
from peftsurgery.surgery.fold.readers import check_readers
from peftsurgery.surgery.fold.untying import untie
from peftsurgery.surgery.fourbit.requantise import FoldError, error_of, pack_layers
from peftsurgery.surgery.model.operated import OperatedModel
from peftsurgery.surgery.plan.cut import Cut, in_order
from peftsurgery.surgery.rewrite.layout import disorient, orient, wide


@checked
def fold(model: GraphModel, requantise: bool = False) -> nn.Module:
    """A plain module of the class that was captured, with the active adapters in its weights.

    Weights that no operation changed share memory with the model's. Weights that were kept in four
    bits are written in the base's dtype, or with ``requantise`` packed again, in bitsandbytes'
    layers; :func:`fold_error` tells the error. Raises PSG401 for a rule that cannot be folded,
    PSG402 if a weight would overflow its dtype, PSG403 for values that are not finite, PSG404 for a
    tie that the architecture insists on, PSG405 for a bias that is not there, PSG406 for a weight
    that no four-bit layer can have, PSG407 if none was kept in four bits, PSG408 for a weight that
    something else reads too.
    """
    model.bind()
    model.check_in_place()
    changed = new_weights(model) if isinstance(model, OperatedModel) else {}
    with making():
        plain = _rebuild(model, changed)
    modes = {path: part.training for path, part in model.named_modules()}
    for path, part in plain.named_modules():
        part.training = modes.get(path, model.training)
    if requantise:
        pack_layers(plain, model.stored if isinstance(model, OperatedModel) else {})
    return plain


@torch.no_grad()
@checked
def fold_error(model: GraphModel, requantise: bool = False) -> FoldError:
    """How far the weights that :func:`fold` writes are from the exact ones.

    Raises what :func:`fold` raises for the weights.
    """
    if not isinstance(model, OperatedModel):
        return error_of({}, {}, {})
    model.bind()
    exact = _exact_for_all(model)
    return error_of(exact, _rounded(model, exact), model.stored if requantise else {})


def new_weights(model: OperatedModel) -> dict[str, torch.Tensor]:
    """The weights that the operations change, by name, rounded to the dtype they had.

    PSG401 where the rows of a batch have weights of their own.
    """
    return _rounded(model, _exact_for_all(model))


def _exact_for_all(model: OperatedModel) -> dict[str, torch.Tensor]:
    """The exact weights; PSG401 where the rows of a batch have weights of their own."""
    if model.is_by_row:
        raise SurgeryError("PSG401", "each row has its own weights", "leave rows(...) to fold")
    return exact_weights(model)


def _rounded(model: OperatedModel, exact: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: _round(name, value, model.dense(name).dtype) for name, value in exact.items()}


@torch.no_grad()
def exact_weights(model: OperatedModel) -> dict[str, torch.Tensor]:
    """The weights that the operations change, by name, in the dtype they were added in.

    A weight that is kept packed is changed by that: it is unpacked.
    """
    working: dict[str, torch.Tensor] = {
        name: model.dense(name) for name in (*model.trained, *model.stored)
    }
    done: set[Any] = set()
    check_readers(model.active_cuts, model.sites)
    for cut in in_order(model.active_cuts):
        _check_foldable(cut)
        weights = cut.weights
        key = (cut.operation, id(cut.rule), cut.site.slice, tuple(weights.items()))
        if key in done or not cut.rule.rewrite:
            continue  # a layer that is called twice has one weight
        done.add(key)
        _fold_cut(model, cut, weights, working)
    return working | {a: value for name, value in working.items() for a in model.unread(name)}


def _fold_cut(
    model: OperatedModel,
    cut: Cut,
    names: Mapping[str, str],
    working: dict[str, torch.Tensor],
) -> None:
    stored = {
        name: wide(working[full] if full in working else model.dense(full))
        for name, full in names.items()
    }
    dtype = next(iter(stored.values())).dtype
    bound: dict[str, Any] = {**dict.fromkeys(cut.rule.kind.weights, 0.0), **cut.numbers}
    bound.update({name: orient(value, cut.site, name) for name, value in stored.items()})
    for name, full in cut.parameters.items():
        bound[name] = _finite(full, model.get_parameter(full).detach()).to(dtype)
    for name, value in folded_weights(cut.rule, bound).items():
        if name not in names and _is_nothing(value):
            continue  # `b * s` where there is no bias
        if name not in names:
            raise SurgeryError(
                "PSG405",
                f"{cut.operation.name} folds into a bias, and {cut.placed.module} has none",
                "add a bias to the model, or keep the adapter",
            )
        working[names[name]] = disorient(stored[name], cut.site, name, value)


def _is_nothing(value: Any) -> bool:
    """Whether a folded bias is zero: a model without one has it already."""
    return not torch.as_tensor(value).any()


def _instead(cut: Cut) -> str:
    """What to do with a method that is no change of weights."""
    ship = "what it computes is not a change of weights; ship the saved surgery with the base"
    return ship if cut.operation.file.flat is None else f"{ship}, flatten()ed first"


def _check_foldable(cut: Cut) -> None:
    if cut.rule.rewrite and not cut.rule.fold:
        raise SurgeryError(
            "PSG401",
            f"'{cut.operation.name}' cannot be folded: its rule has no `fold:`",
            _instead(cut),
        )
    read = names_in(cut.rule.fold.values(), cut.rule, cut.numbers)
    for name in sorted(read | cut.rule.fold.keys()):
        node = cut.site.nodes.get(name)
        if node is not None and node.op != "get_attr":
            raise SurgeryError(
                "PSG401",
                f"'{cut.operation.name}' cannot be folded at '{cut.placed.module}': '{name}' is "
                f"computed there ({node.name}), and no weight",
                "let the pattern name the weight itself, or keep the adapter",
            )


def _finite(name: str, value: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(value).all():
        raise SurgeryError("PSG403", f"'{name}' holds NaN or infinity")
    return value


def _round(name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    _finite(name, value)
    rounded = value.to(dtype)
    if not torch.isfinite(rounded).all():
        raise SurgeryError("PSG402", f"'{name}' overflows {dtype} once it is folded")
    return rounded.contiguous()


def _rebuild(model: GraphModel, changed: Mapping[str, torch.Tensor]) -> nn.Module:
    """The original module with the model's tensors, some of them changed.

    Parameters that are not changed share the model's memory.
    """
    source = model.source.weights()
    memo: dict[int, Any] = {}
    for name, tensor in sorted(named_tensors(source), key=lambda item: item[0] in changed):
        here = model.base_name(name) if isinstance(model, OperatedModel) else name
        owner, _, leaf = here.rpartition(".")
        mine: torch.Tensor = getattr(model.get_submodule(owner), leaf).detach()
        if name in changed:
            mine = tensor.new_empty(0)  # replaced below; it may be packed, which is no weight
        if isinstance(tensor, nn.Parameter):
            memo.setdefault(id(tensor), nn.Parameter(mine, requires_grad=tensor.requires_grad))
        else:
            memo.setdefault(id(tensor), mine.clone())
    plain = copy.deepcopy(source, memo)
    names = tensor_names(source)
    made: dict[str, nn.Parameter] = {}
    for name, value in changed.items():
        owner, _, leaf = name.rpartition(".")
        part = plain.get_submodule(owner)
        old = part._parameters[leaf]
        trainable = old is None or old.requires_grad
        twins = (made[a] for a in names[name] if a in made and torch.equal(made[a], value))
        twin = next(twins, None)
        made[name] = nn.Parameter(value, requires_grad=trainable) if twin is None else twin
        part._parameters[leaf] = made[name]
    if isinstance(plain, PreTrainedModel) and any(_is_broken(changed, names[n]) for n in changed):
        untie(plain, [name for name, aliases in names.items() if len(aliases) > 1])
    return plain


def _is_broken(changed: Mapping[str, torch.Tensor], aliases: Iterable[str]) -> bool:
    values = [changed.get(alias) for alias in aliases]
    return any(
        value is None or values[0] is None or not torch.equal(value, values[0]) for value in values
    )
