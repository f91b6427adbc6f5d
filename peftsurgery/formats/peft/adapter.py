"""A peft adapter as it was read: its config, its tensors, and what each of them is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from peftsurgery.capture.tensors import tensor_names
from peftsurgery.formats.adapter_files import read_safetensors
from peftsurgery.formats.peft.beside import split_beside
from peftsurgery.formats.peft.config import PARAMETERS, AdapterConfig
from peftsurgery.formats.peft.files import read_peft_config, tensors_file
from peftsurgery.formats.peft.library import known_names
from peftsurgery.formats.peft.module_paths import saved_whole, target_test
from peftsurgery.formats.peft.target_modules import tied
from peftsurgery.formats.peft.tensor_keys import Names, sort_keys


@dataclass(frozen=True)
class PeftAdapter:
    """A directory of peft's: the values of its config, and its tensors by their keys."""

    folder: Path
    config: AdapterConfig
    tensors: Mapping[str, Tensor]
    names: Names
    beside: tuple[PeftAdapter, ...] = ()
    """Adapters of other methods in its files, each at one module."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the model's own parameters, by their names."""
        return {name: tuple(self.tensors[key].shape) for name, key in self.names.own.items()}

    def trains(self, name: str, model: nn.Module) -> bool:
        """Whether a parameter of ``model`` is one that the adapter trains whole.

        Its module is one of the config's modules_to_save, or its weight is tied to that of one and
        has the same values here (peft's ensure_weight_tying).
        """
        saved = self.config.names("modules_to_save")
        if name in self.names.again or saved_whole(name.rpartition(".")[0], saved):
            return True
        others = (a for a in tensor_names(model).get(name, ()) if a in self.names.own and a != name)
        value = self.tensors[self.names.own[name]]
        return any(
            saved_whole(other.rpartition(".")[0], saved)
            and torch.equal(value, self.tensors[self.names.own[other]])
            for other in others
        )

    def renamed(self, modules: Mapping[str, str]) -> PeftAdapter:
        """The adapter with other names for modules that it is at."""
        added = {modules.get(path, path): keys for path, keys in self.names.added.items()}
        return replace(self, names=replace(self.names, added=added))

    def once(self, model: nn.Module) -> PeftAdapter:
        """The adapter at one module for each weight: tied ones may have the same tensors again.

        At one that the config means, if it means any.
        """
        means, added = target_test(self.config), dict[str, dict[str, str]]()
        for path in sorted(self.names.added, key=lambda path: not means(path)):
            keys = self.names.added[path]
            values = {suffix: self.tensors[key] for suffix, key in keys.items()}
            twins = [added[other] for other in tied(model, path) if other in added]
            if not any(
                twin.keys() == keys.keys()
                and all(torch.equal(self.tensors[twin[s]], value) for s, value in values.items())
                for twin in twins
            ):
                added[path] = keys
        return replace(self, names=replace(self.names, added=added))


def read_adapter(folder: Path) -> PeftAdapter:
    """The adapter in a directory. PSG501 to PSG506 for one that is damaged or not honoured."""
    config = AdapterConfig(read_peft_config(folder))
    tensors = read_safetensors(tensors_file(folder))
    names = sort_keys(tensors, known_names(), nested=bool(config.names(PARAMETERS)))
    names, others = split_beside(config, names)
    beside = (PeftAdapter(folder, of_other, tensors, its) for of_other, its in others)
    return PeftAdapter(folder, config, tensors, names, tuple(beside))
