"""Weights that a model keeps packed: which they are, and when they are packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from peftsurgery.errors import SurgeryError
from peftsurgery.language.storage import storage_of
from peftsurgery.surgery.fourbit.pack import PACKABLE, Stored, pack, recipe_of, unpack
from peftsurgery.surgery.plan.cut import Cut

if TYPE_CHECKING:
    from peftsurgery.surgery.model.operated import OperatedModel
    from peftsurgery.surgery.model.packed_weights import Keeping


class Store:
    """The packed weights of one model, by name."""

    def __init__(self) -> None:
        self.weights: dict[str, Stored] = {}
        self.packed: set[str] = set()
        self.dtypes: dict[str, torch.dtype] = {}

    def adopt(self, other: Store) -> None:
        """Take over the record of packed weights from a model whose tensors are shared."""
        self.weights, self.packed = dict(other.weights), set(other.packed)
        self.dtypes = dict(other.dtypes)

    def dtype_of(self, model: OperatedModel, name: str) -> torch.dtype:
        """The dtype of a weight of the base as it is now, before it is packed."""
        return (
            self.weights[name].recipe.dtype
            if name in self.packed
            else model.get_parameter(name).dtype
        )

    def settle(self, model: OperatedModel, cuts: Sequence[Cut]) -> None:
        """Determine what the cuts store, and unpack what was packed otherwise before."""
        inherited, self.weights = self.weights, stored_by(model, cuts, self)
        for name in list(self.packed):
            if name not in self.weights or self.weights[name].recipe != inherited[name].recipe:
                self.packed.discard(name)
                _put(model, name, model.base.get_parameter(name))
                model._bound = model._bound and model.base._bound

    def pack(self, model: OperatedModel) -> None:
        """Replace dense weights by their packed ones, one after the other."""
        for name, stored in self.weights.items():
            weight = model.get_parameter(name)
            if name not in self.packed and not weight.is_meta:
                self.packed.add(name)
                _put(model, name, pack(weight.detach(), stored.recipe))

    def cast(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Note what a cast of the model makes of its weights: packed ones stay as they are."""
        for name, stored in self.weights.items():
            before = self.dtypes.get(name, stored.recipe.dtype)
            self.dtypes[name] = fn(torch.empty(0, dtype=before)).dtype

    def casts(self, model: Keeping) -> frozenset[tuple[str, torch.dtype]]:
        """The packed weights that a graph now reads in another dtype than the base has."""
        read = {
            name: self.dtypes.get(name, self.weights[name].recipe.dtype) for name in self.packed
        }
        return frozenset(
            (name, dtype) for name, dtype in read.items() if dtype != model.original(name).dtype
        )

    def dense(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Dense value of a weight: unpacked if it is kept packed."""
        if name not in self.packed:
            return tensor
        recipe = self.weights[name].recipe
        return unpack(tensor, recipe).to(self.dtypes.get(name, recipe.dtype))

    def saved(self, tensors: Mapping[str, torch.Tensor]) -> int:
        """Dense element count minus stored bytes, summed over packed weights."""
        rows = ((self.weights[name].recipe.shape, tensors[name].numel()) for name in self.packed)
        return sum(shape[0] * shape[1] - count for shape, count in rows)


def stored_by(model: OperatedModel, cuts: Sequence[Cut], store: Store) -> dict[str, Stored]:
    """Packed weights that the cuts ask for, by name.

    Raises PSG325 for one that cannot be packed.
    """
    found: dict[str, Stored] = {}
    for cut in cuts:
        for name, expression in cut.rule.store.items():
            if name not in cut.weights:
                continue  # a layer without a bias
            full, storage = cut.weights[name], storage_of(expression, cut.operation.settings)
            shape, dtype = model.original(full).shape, store.dtype_of(model, full)
            _check(cut, full, shape, dtype)
            recipe = recipe_of(storage, shape, dtype, name in cut.site.turned)
            compute = None if storage.compute is None else getattr(torch, storage.compute)
            stored = Stored(recipe, compute, cut.operation.name)
            other = found.setdefault(full, stored)
            if other[:2] != stored[:2]:
                raise _refuse(full, f"is stored in another way by '{other.adapter}'")
    for cut in cuts:
        if cut.rule.train and cut.placed.parameter in found:
            raise _refuse(str(cut.placed.parameter), "is trained by another rule")
    return found


def _check(cut: Cut, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Refuse what is no matrix of its own in a usual dtype. PSG325."""
    if cut.site.slice is not None:
        raise _refuse(name, "is one weight, of which this rule matches a part")
    if len(shape) != 2:
        raise _refuse(name, f"has shape {list(shape)}, and only matrices can be")
    if dtype not in PACKABLE:
        raise _refuse(name, f"is in {dtype}, which has no four-bit form")


def _refuse(name: str, why: str) -> SurgeryError:
    hint = "leave it out with `where:`, or with the setting that the rule has for that"
    return SurgeryError("PSG325", f"'{name}' cannot be stored in four bits: it {why}", hint)


def _put(model: OperatedModel, name: str, value: torch.Tensor) -> None:
    """Replace a parameter's tensor under all of its names."""
    parameter = nn.Parameter(value.detach(), requires_grad=False)
    for each in (name, *model.unread(name)):
        owner, _, leaf = each.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = parameter
