"""What a fold does to a model's parameters, by their names in the model.

It is made once, kept, and laid on the files of a base, whose names may be spelled otherwise.
A saved surgery has it in its manifest, under ``fold``:

    {"of": "<hash>", "sites": [...], "replaced": {}, "shapes": {"...q_proj.weight": [64, 64]},
     "stacks": {}, "ties": [], "untied": {}, "body": "model", "library": true}

``of`` is the hash of this and of all else in the surgery that decides what is folded, rules above
all: where it is another, someone has changed those, and the plan is not of what is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from peftsurgery.checkpoint.plan import FoldPlan, Piece, SiteFold
from peftsurgery.checkpoint.plan_file import site_as_data, site_from_data, stacks_from_data
from peftsurgery.errors import SurgeryError
from peftsurgery.model_files import ModelFiles

IN_MEMORY = "fold in memory: fold_to_directory"
DECIDING = ("operations", "active", "left_out", "trained", "buffers", "build")


@dataclass(frozen=True)
class ModelPlan:
    """The fold of some adapters, as far as it can be said without the files of the base.

    ``replaced`` has the adapter's tensors by the parameters that they replace. ``shapes`` are of
    all parameters that are read. ``stacks`` has the pieces of stacks of experts that files may hold
    one by one. Where a parameter changes that is one tensor with others, ``ties`` are all groups of
    names that are one, and ``untied`` what config.json then says, by the dotted paths in it.
    ``body`` is what the names of a model with a head begin with, and of one without do not.
    ``library`` tells whether it is a model of transformers.
    """

    sites: tuple[SiteFold, ...]
    replaced: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    stacks: Mapping[str, tuple[Piece, ...]]
    ties: tuple[tuple[str, ...], ...]
    untied: Mapping[str, Any]
    body: str
    library: bool

    def on(
        self,
        files: ModelFiles,
        resized: Mapping[str, tuple[int, str | None]] = MappingProxyType({}),
    ) -> FoldPlan:
        """The plan by the names in a base's files, of which some are ``resized`` as plans say it.

        PSG416 for a parameter that is in no file.
        """
        held, ties = files.tensors, dict[str, str]()

        def named(name: str) -> str | None:
            return self.spelled(name, held)

        for group in self.ties:
            first = next(filter(None, map(named, group)), None)
            if first is not None:
                ties |= {each: first for each in (named(n) or n for n in group) if each != first}
        stored = {name: named(name) or name for name in self.shapes}
        stacks = dict[str, tuple[Piece, ...]]()
        for name in self.stacks.keys() - {n for n in self.stacks if named(n)}:
            spelled = [(named(piece), e, i, j) for piece, e, i, j in self.stacks[name]]
            pieces = tuple((piece, e, i, j) for piece, e, i, j in spelled if piece is not None)
            columns = self.shapes[name][-1:]
            fit = (held[piece][1].shape == (j - i, *columns) for piece, _, i, j in pieces)
            if len(pieces) == len(spelled) and all(fit):
                stacks[name] = pieces
        for name, mine in sorted(stored.items()):
            if name in stacks:
                continue
            where = held.get(ties.get(mine, mine) if mine not in held else mine)
            axis = 1 if name in resized else 0
            if where is None or where[1].shape[axis:] != self.shapes[name][axis:]:
                why = f"'{name}', which the fold changes, is in no file of '{files.folder}' as it"
                raise SurgeryError("PSG416", f"{why} is", IN_MEMORY)
        sites = (
            replace(site, weights={short: stored[n] for short, n in site.weights.items()})
            for site in self.sites
        )
        replaced = {stored[name]: key for name, key in self.replaced.items()}
        rows = {named(name) or name: value for name, value in resized.items()}
        rows = {name: value for name, value in rows.items() if name in held or name in ties}
        told = FoldPlan(tuple(sites), replaced, stacks=stacks, resized=rows)
        return replace(told, ties=ties, untied=self.untied)

    def spelled(self, name: str, held: Collection[str]) -> str | None:
        """What the files call a parameter; None if they do not have it."""
        prefix = f"{self.body}."
        spelled = (name, name.removeprefix(prefix), prefix + name)
        return next((each for each in spelled if each in held), None)

    def to_dict(self) -> dict[str, Any]:
        """The plan as a manifest holds it, but for its hash."""
        return {
            "sites": [site_as_data(site) for site in self.sites],
            "replaced": dict(self.replaced),
            "shapes": dict(self.shapes),
            "stacks": {name: [list(each) for each in own] for name, own in self.stacks.items()},
            "ties": [list(names) for names in self.ties],
            "untied": dict(self.untied),
            "body": self.body,
            "library": self.library,
        }

    @staticmethod
    def parse(said: Mapping[str, Any]) -> ModelPlan:
        """Read what :meth:`to_dict` wrote. Any error of Python's for what is none."""
        return ModelPlan(
            sites=tuple(site_from_data(entry) for entry in said["sites"]),
            replaced=dict(said["replaced"]),
            shapes={name: tuple(sizes) for name, sizes in said["shapes"].items()},
            stacks=stacks_from_data(said["stacks"]),
            ties=tuple(tuple(map(str, names)) for names in said["ties"]),
            untied={str(path): value for path, value in said["untied"].items()},
            body=said["body"],
            library=said["library"],
        )


def with_hash(
    fold: Mapping[str, Any], manifest: Mapping[str, Any], rules: Iterable[bytes]
) -> dict[str, Any]:
    """A plan as a manifest holds it, with its hash; ``rules`` is what the rule files hold."""
    made = {key: value for key, value in fold.items() if key != "of"}
    told = [made, *(manifest.get(key) for key in DECIDING)]
    parts = (json.dumps(told, sort_keys=True).encode(), *rules)
    digests = b"".join(hashlib.sha256(part).digest() for part in parts)
    return {**made, "of": hashlib.sha256(digests).hexdigest()}
