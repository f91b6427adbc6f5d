"""Tensors that are not in a base's files as they are written: resized ones, and ties that break.

transformers ties an output's table to the input's by a flag of the config, and files hold one of
them. What a fold makes of each is computed and compared, before anything is written, where it
changes all of them; where it changes some, they are unlike.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from peftsurgery.checkpoint.arrays import FLOATS, Array
from peftsurgery.checkpoint.codecs.coded import PlainView, needed_view
from peftsurgery.checkpoint.fold_tensor import Folding
from peftsurgery.checkpoint.plan import FoldPlan
from peftsurgery.errors import SurgeryError
from peftsurgery.model_files import ModelFiles
from peftsurgery.tensor_file import Tensor, size_of


def view_of(plan: FoldPlan, files: ModelFiles, requantise: bool = False) -> PlainView:
    """The view in which a plan is carried out if all that is tied becomes unlike.

    PSG416 for a quantised weight that is tied or resized, and if there is nothing that could be
    quantised again.
    """
    view = needed_view(files, plan.changed, requantise)
    whole, held = {*plan.ties, *plan.ties.values(), *plan.resized}, files.tensors
    for name in sorted(whole & view.coded.keys()):
        raise SurgeryError("PSG416", f"'{name}' is quantised, and tied to another or resized")
    added = {n: first for n, first in plan.ties.items() if n not in held}
    resized = dict[str, Tensor]()
    for name, (rows, _) in plan.resized.items():
        stored = held[added.get(name, name)][1]
        shape = (rows, *stored.shape[1:])
        resized[name] = Tensor(name, stored.dtype, shape, 0, size_of(stored.dtype, shape))
    return replace(view, added=added, resized=resized)


def settled(folding: Folding, view: PlainView) -> tuple[Folding, PlainView]:
    """The fold and its view as they are carried out: with ties, if all of them stay alike."""
    plan = folding.plan
    if any(not _are_alike(folding, *names) for names in plan.ties.items()):
        return folding, view
    sites = tuple(s for s in plan.sites if view.added.keys().isdisjoint(s.weights.values()))
    replaced = {name: key for name, key in plan.replaced.items() if name not in view.added}
    rows = {name: value for name, value in plan.resized.items() if name not in view.added}
    tied = replace(plan, sites=sites, replaced=replaced, ties={}, untied={}, resized=rows)
    view = replace(view, added={})
    return replace(folding, plan=tied, base=view.tensors), view


def _are_alike(folding: Folding, name: str, other: str) -> bool:
    """Whether two tensors that are one in the base are written alike."""
    changed = [each in folding.plan.changed for each in (name, other)]
    if not all(changed):
        return not any(changed)
    dtype = FLOATS[folding.base[other][1].dtype]

    def written(blocks: tuple[Array, Array]) -> Array:
        return blocks[1].astype(dtype)

    pairs = zip(*(map(written, folding.exact(each)) for each in (name, other)), strict=False)
    return all(one.shape == two.shape and np.array_equal(one, two) for one, two in pairs)
