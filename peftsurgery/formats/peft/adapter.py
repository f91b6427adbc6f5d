"""A peft adapter as it was read: its config, its tensors, and what each of them is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from peftsurgery.capture.tensors import tensor_names
from peftsurgery.formats.adapter_files import read_safetensors
from peftsurgery.formats.peft.config import PARAMETERS, AdapterConfig
from peftsurgery.formats.peft.files import read_peft_config, tensors_file
from peftsurgery.formats.peft.library import known_names
from peftsurgery.formats.peft.module_paths import saved_whole
from peftsurgery.formats.peft.tensor_keys import Names, sort_keys


@dataclass(frozen=True)
class PeftAdapter:
    """A directory of peft's: the values of its config, and its tensors by their keys."""

    folder: Path
    config: AdapterConfig
    tensors: Mapping[str, Tensor]
    names: Names

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


def read_adapter(folder: Path) -> PeftAdapter:
    """The adapter in a directory. PSG501 to PSG506 for one that is damaged or not honoured."""
    config = AdapterConfig(read_peft_config(folder))
    tensors = read_safetensors(tensors_file(folder))
    names = sort_keys(tensors, known_names(), nested=bool(config.names(PARAMETERS)))
    return PeftAdapter(folder, config, tensors, names)
