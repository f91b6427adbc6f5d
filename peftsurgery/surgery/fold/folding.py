"""fold: a plain module with the operations of a model in its weights.

A tied weight of which one side was adapted is untied, or the fold is refused: it is never silently
shared.
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
from peftsurgery.capture.sharded import check_whole
from peftsurgery.capture.tensors import named_tensors, owner_of, tensor_names
from peftsurgery.capture.threads import making
from peftsurgery.surgery.fold.untying import untie
from peftsurgery.surgery.fourbit.requantise import FoldError, Gap, error_of, pack_layers
from peftsurgery.surgery.model.operated import OperatedModel
from peftsurgery.surgery.rewrite.folded_weights import FoldedWeight, folded_weights


@checked
def fold(model: GraphModel, requantise: bool = False) -> nn.Module:
    """Fold the active adapters into the weights; returns a plain module of the captured class.

    Weights that no operation changed share memory with the model's. Weights that were kept in four
    bits are written in the base's dtype, or with ``requantise`` packed again, in bitsandbytes'
    layers; :func:`fold_error` tells the error. Raises PSG401 for a rule that cannot be folded,
    PSG402 if a weight would overflow its dtype, PSG403 for values that are not finite, PSG404 for a
    tie that the architecture insists on, PSG405 for a bias that is not there, PSG406 for a weight
    that no four-bit layer can have, PSG407 if none was kept in four bits, PSG408 for a weight that
    something else reads too.
    """
    plain, _ = fold_with_error(model)
    if requantise:
        pack_layers(plain, model.stored if isinstance(model, OperatedModel) else {})
    return plain


def fold_with_error(model: GraphModel, requantise: bool = False) -> tuple[nn.Module, FoldError]:
    """Fold in full precision, and measure the rounding error (absolute) of the weights.

    With ``requantise`` the error is that of the weights packed again. Raises what :func:`fold`
    raises for the weights.
    """
    model.bind()
    model.check_in_place()
    check_whole(model)
    changed: dict[str, torch.Tensor] = {}
    gaps: dict[str, Gap] = {}
    for weight in _weights_of(model, requantise):
        changed |= dict.fromkeys(weight.names, weight.value)
        gaps |= dict.fromkeys(weight.names, weight.gap)
    with making():
        plain = _rebuild(model, changed)
    modes = {path: part.training for path, part in model.named_modules()}
    for path, part in plain.named_modules():
        part.training = modes.get(path, model.training)
    return plain, error_of(gaps)


@checked
def fold_error(model: GraphModel, requantise: bool = False) -> FoldError:
    """Measure the rounding error of a fold: its weights against exact ones, absolute.

    Raises what :func:`fold` raises for the weights.
    """
    model.bind()
    weights = _weights_of(model, requantise)
    return error_of({name: weight.gap for weight in weights for name in weight.names})


def _weights_of(model: GraphModel, requantise: bool) -> Iterable[FoldedWeight]:
    """Each weight that the model's operations change; none if there are no operations."""
    if not isinstance(model, OperatedModel):
        return ()
    return folded_weights(model.foldable({*model.trained, *model.stored}), requantise)


def _rebuild(model: GraphModel, changed: Mapping[str, torch.Tensor]) -> nn.Module:
    """The original module with the model's tensors, some of them changed.

    Parameters that are not changed share the model's memory.
    """
    source = model.source.weights()
    memo: dict[int, Any] = {}
    for name, tensor in sorted(named_tensors(source), key=lambda item: item[0] in changed):
        here = model.base_name(name) if isinstance(model, OperatedModel) else name
        mine: torch.Tensor = getattr(*owner_of(model, here)).detach()
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
        part, leaf = owner_of(plain, name)
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
    first, *others = (changed.get(alias) for alias in aliases)
    return first is None or any(other is None or not torch.equal(other, first) for other in others)
