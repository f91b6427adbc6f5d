"""An adapter under the names of kohya's trainer, which diffusers and other image tools read.

A module's path has its dots replaced, ``lora_unet_down_blocks_0_...``; the scale of each module is
its alpha over its rank, so alpha is written for each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from peftsurgery.checkpoint.lora_folder import LoraFolder
from peftsurgery.formats.plain_lora import one_file, places_read, plain_lora, row_of, unsaid
from peftsurgery.formats.words import words_of
from peftsurgery.surgery.model.operated import OperatedModel
from peftsurgery.tensor_file import header_of, laid_out

FILE, PROGRAM = "pytorch_lora_weights.safetensors", "kohya"


def to_kohya(model: OperatedModel, out: Path, name: str | None, force: bool) -> tuple[str, ...]:
    """Write the adapter to the file ``out``, or into the directory ``out``. PSG521, PSG522."""
    words = words_of(Path(__file__).with_name("library.yaml"))
    row = row_of(model, words["components"], type(model.source.module).__name__, PROGRAM)
    with plain_lora(model, name) as lora:
        names = _names(lora, row)
        with one_file(out, FILE, force, places_read(model)) as file:
            _write(lora, names, file)
    wanted = row.get("wanted", "")
    if any(module.endswith(wanted) for module in lora.layers):
        return ()
    return (f"diffusers loads it only with an adapter of '{wanted}' in it",)


def _names(lora: LoraFolder, row: dict[str, Any]) -> dict[str, str]:
    """Kohya's names by module. PSG521 if two modules would have one."""
    names: dict[str, str] = {}
    for module, layer in lora.layers.items():
        if layer.kind == "embedding":
            raise unsaid(f"'{module}' is an embedding, and {PROGRAM}'s names are for layers")
        path = module.removeprefix(row.get("without", ""))
        name = row["prefix"] + path.replace(".", "_")
        if name in names.values():
            raise unsaid(f"'{name}' would be the name of two modules, '{module}' and another")
        names[module] = name
    return names


def _write(lora: LoraFolder, names: dict[str, str], file: Path) -> None:
    described: list[tuple[str, str, tuple[int, ...]]] = []
    for module, layer in lora.layers.items():
        described.append((f"{names[module]}.alpha", "F32", ()))
        described.append((f"{names[module]}.lora_down.weight", "F32", layer.down.shape))
        described.append((f"{names[module]}.lora_up.weight", "F32", layer.up.shape))
    with file.open("wb") as stream:
        stream.write(header_of(laid_out(described), {"format": "pt"}))
        for layer in lora.layers.values():
            alpha = np.asarray(layer.scale * layer.rank, np.float32)
            for value in (alpha, *layer.read()):
                stream.write(np.ascontiguousarray(value, np.float32).tobytes())
