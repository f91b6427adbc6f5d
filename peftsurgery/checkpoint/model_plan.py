"""What a fold does to a model's parameters, by their names in the model.

It is made once, kept, and laid on the files of a base, whose names may be spelled otherwise.
A saved surgery has it in its manifest, under ``fold``:

    {"of": "<hash>", "sites": [...], "replaced": {}, "shapes": {"...q_proj.weight": [64, 64]},
     "tied": {}, "body": "model", "library": true}

``of`` is the hash of this and of all else in the surgery that decides what is folded, rules above
all: where it is another, someone has changed those, and the plan is not of what is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from peftsurgery.checkpoint.plan import SiteFold
from peftsurgery.checkpoint.plan_file import site_as_data, site_from_data
from peftsurgery.errors import SurgeryError
from peftsurgery.model_files import ModelFiles

IN_MEMORY = "fold in memory: fold_to_directory"
DECIDING = ("operations", "active", "left_out", "trained", "buffers", "build")


@dataclass(frozen=True)
class ModelPlan:
    """The fold of some adapters, as far as it can be said without the files of the base.

    ``replaced`` has the adapter's tensors by the parameters that they replace. ``shapes`` are of
    all parameters that are read, ``tied`` has the other names of those that change and are one
    tensor with others. ``body`` is what the names of a model with a head begin with, and of one
    without do not. ``library`` tells whether it is a model of transformers.
    """

    sites: tuple[SiteFold, ...]
    replaced: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, list[str]]
    body: str
    library: bool

    def on(self, files: ModelFiles) -> tuple[tuple[SiteFold, ...], dict[str, str]]:
        """The sites and the replaced tensors, by the names in a base's files.

        Raises PSG416 for a tie that would be broken, and for a parameter that is in no file.
        """
        for name, others in self.tied.items():
            why = f"'{name}' is tied to {', '.join(others)}, which the fold would change or untie"
            raise SurgeryError("PSG416", why, IN_MEMORY)
        stored = {name: self._stored(name, files) for name in sorted(self.shapes)}
        sites = (
            replace(site, weights={short: stored[n] for short, n in site.weights.items()})
            for site in self.sites
        )
        return tuple(sites), {stored[name]: key for name, key in self.replaced.items()}

    def _stored(self, name: str, files: ModelFiles) -> str:
        held, prefix = files.tensors, f"{self.body}."
        spelled = (name, name.removeprefix(prefix), prefix + name)
        found = next((each for each in spelled if each in held), None)
        if found is None or held[found][1].shape != self.shapes[name]:
            why = f"'{name}', which the fold changes, is in no file of '{files.folder}' as it is"
            raise SurgeryError("PSG416", why, IN_MEMORY)
        return found

    def to_dict(self) -> dict[str, Any]:
        """The plan as a manifest holds it, but for its hash."""
        return {
            "sites": [site_as_data(site) for site in self.sites],
            "replaced": dict(self.replaced),
            "shapes": dict(self.shapes),
            "tied": dict(self.tied),
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
            tied=dict(said["tied"]),
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
