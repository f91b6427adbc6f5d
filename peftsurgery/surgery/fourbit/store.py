"""Packed weights of a model: which they are, and how they are packed and unpacked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from peftsurgery.capture.program import TensorInfo
from peftsurgery.errors import SurgeryError
from peftsurgery.language.storage import storage_of
from peftsurgery.surgery.fourbit.pack import PACKABLE, PackedWeight, pack, recipe_of, unpack
from peftsurgery.surgery.plan.cut import Cut

Read = Callable[[str], torch.Tensor]


class PackedWeights:
    """Packed weights of one model, by name.

    ``weights`` are those that rules store, ``packed`` those of them that are bytes by now, and
    ``dtypes`` what a cast of the model made of their dtypes.
    """

    def __init__(self, other: PackedWeights | None = None) -> None:
        """Start from ``other``, whose tensors the model shares."""
        self.weights: dict[str, PackedWeight] = {} if other is None else dict(other.weights)
        self.packed: set[str] = set() if other is None else set(other.packed)
        self.dtypes: dict[str, torch.dtype] = {} if other is None else dict(other.dtypes)

    def settle(self, cuts: Sequence[Cut], infos: Mapping[str, TensorInfo], read: Read) -> list[str]:
        """Take over what the cuts store; returns names of packed weights to be unpacked again.

        ``infos`` describe the base's tensors, ``read`` gives the model's. PSG325 for a weight that
        cannot be stored, or not in two ways.
        """
        dtypes = {n: s.recipe.dtype for n, s in self.weights.items() if n in self.packed}
        before, self.weights = self.weights, _stored_by(cuts, infos, dtypes, read)
        stale = [
            name
            for name in self.packed
            if name not in self.weights or self.weights[name].recipe != before[name].recipe
        ]
        self.packed -= {*stale}
        return stale

    def pack(self, read: Read, put: Callable[[str, torch.Tensor], None]) -> None:
        """Replace dense weights by their packed ones, one after the other.

        ``read`` gives a weight of the model by its name, ``put`` puts another tensor in its place.
        """
        for name, stored in self.weights.items():
            weight = read(name)
            if name not in self.packed and not weight.is_meta:
                self.packed.add(name)
                put(name, pack(weight.detach(), stored.recipe))

    def cast(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Record the dtype of a cast of the model; packed weights stay as they are."""
        for name in self.weights:
            self.dtypes[name] = fn(torch.empty(0, dtype=self._dtype(name))).dtype

    def casts(self, infos: Mapping[str, TensorInfo]) -> frozenset[tuple[str, torch.dtype]]:
        """Packed weights that are read in another dtype than ``infos``', with that dtype."""
        read = ((name, self._dtype(name)) for name in self.packed)
        return frozenset((name, dtype) for name, dtype in read if dtype != infos[name].dtype)

    def dense(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Dense value of a weight, given the model's tensor, in the dtype in which it is read.

        Shape (out, in), or (in, out) where the base keeps it so.
        """
        if name not in self.packed:
            return tensor
        return unpack(tensor, self.weights[name].recipe).to(self._dtype(name))

    def hidden(self, tensors: Mapping[str, torch.Tensor]) -> int:
        """Dense element count minus stored bytes, summed over packed weights."""
        rows = ((self.weights[name].recipe.shape, tensors[name].numel()) for name in self.packed)
        return sum(shape[0] * shape[1] - count for shape, count in rows)

    def _dtype(self, name: str) -> torch.dtype:
        return self.dtypes.get(name, self.weights[name].recipe.dtype)


def _stored_by(
    cuts: Iterable[Cut],
    infos: Mapping[str, TensorInfo],
    packed: Mapping[str, torch.dtype],
    read: Read,
) -> dict[str, PackedWeight]:
    """Packed weights that cuts ask for, by name; ``packed`` gives dtypes of bytes kept already."""
    found: dict[str, PackedWeight] = {}
    trained = set()
    for cut in cuts:
        if cut.rule.train:
            trained.add(cut.placed.parameter)
        for name, expression in cut.rule.store.items():
            if name in cut.made:
                raise _refuse(cut.made[name][0], "is one of those that a weight is computed of")
            if name not in cut.weights:
                continue  # a layer without a bias
            full, storage = cut.weights[name], storage_of(expression, cut.operation.settings)
            shape, dtype = infos[full].shape, packed.get(full) or read(full).dtype
            _check(cut, full, shape, dtype)
            recipe = recipe_of(storage, shape, dtype, name in cut.site.turned)
            compute = None if storage.compute is None else getattr(torch, storage.compute)
            stored = PackedWeight(recipe, compute, cut.operation.name)
            other = found.setdefault(full, stored)
            if other[:2] != stored[:2]:
                raise _refuse(full, f"is stored in another way by '{other.adapter}'")
    for name in found:
        if name in trained:
            raise _refuse(name, "is trained by another rule")
    return found


def _check(cut: Cut, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Refuse weights other than whole matrices in a usual dtype. Raises PSG325."""
    if cut.site.slice is not None:
        raise _refuse(name, "is one weight, of which this rule matches a part")
    if len(shape) != 2:
        raise _refuse(name, f"has shape {list(shape)}, and only matrices can be")
    if dtype not in PACKABLE:
        raise _refuse(name, f"is in {dtype}, which has no four-bit form")


def _refuse(name: str, why: str) -> SurgeryError:
    hint = "leave it out with `where:`, or with the setting that the rule has for that"
    return SurgeryError("PSG325", f"'{name}' cannot be stored in four bits: it {why}", hint)
