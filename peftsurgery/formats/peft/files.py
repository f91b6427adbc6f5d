"""The two files of a peft adapter.

    adapter_config.json          what kind of adapter it is, and where it goes
    adapter_model.safetensors    its tensors

Adapters in pickle files (``adapter_model.bin``) are refused: loading one can run code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftsurgery.errors import SurgeryError
from peftsurgery.formats.words import nearby, read_config

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
BASE = "base_model_name_or_path"


def read_peft_config(folder: Path) -> dict[str, Any]:
    """The adapter's config. PSG501 if it is missing, is no JSON object or holds NaN.

    PSG503 if the base that it names is none: whoever folds an adapter opens that first.
    """
    config = read_config(folder, CONFIG)
    base = config.get(BASE)
    if base is not None and not isinstance(base, str):
        message = f"the adapter's {BASE} is {base!r:.60}, which names no model"
        raise SurgeryError("PSG503", message, "it is a text or null")
    return config


def tensors_file(folder: Path) -> Path:
    """The file that holds an adapter's tensors. PSG505 if there is none, or only a pickle."""
    if (folder / TENSORS).is_file():
        return folder / TENSORS
    if (folder / PICKLE).exists():
        message = f"'{folder}' holds its tensors in {PICKLE}, a pickle, which is never loaded"
        hint = "save the adapter again with peft's save_pretrained(safe_serialization=True)"
        raise SurgeryError("PSG505", message, hint)
    raise SurgeryError("PSG505", f"'{folder}' has no {TENSORS}", nearby(folder, CONFIG))
