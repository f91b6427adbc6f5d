"""An adapter's directory as mlx-lm loads it: ``mlx_lm.generate --adapter-path DIR``.

mlx-lm makes LoRA layers of one rank and one scale of all modules with the listed names in the last
``num_layers`` layers, and then loads the tensors. Layers that lack a tensor add nothing. So ranks
are padded with zeros, and each layer's scale is in its ``lora_b``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from peftsurgery.checkpoint.lora_folder import CONFIG, LoraFolder
from peftsurgery.formats.plain_lora import (
    check_alone,
    check_flat,
    config_number,
    in_layer,
    model_type,
    padded,
    places_read,
    plain_lora,
    row_of,
    unsaid,
)
from peftsurgery.formats.words import words_of
from peftsurgery.outputs import fresh
from peftsurgery.surgery.model.operated import OperatedModel
from peftsurgery.tensor_file import header_of, laid_out

TENSORS, PROGRAM = "adapters.safetensors", "mlx-lm"


def to_mlx(model: OperatedModel, out: Path, name: str | None, force: bool) -> tuple[str, ...]:
    """Write the adapter to the directory ``out``. PSG521, PSG522 for what mlx-lm does not load."""
    words = words_of(Path(__file__).with_name("library.yaml"))
    row = row_of(model, words["architectures"], model_type(model), PROGRAM)
    with plain_lora(model, name) as lora:
        for layer in lora.layers.values():
            check_flat(layer, PROGRAM)
            check_alone(model, layer, PROGRAM)
        config = _config(lora, row, config_number(model, "num_hidden_layers"))
        with fresh(out, places_read(model), force) as part:
            part.mkdir()
            (part / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            _write(lora, config["lora_parameters"]["rank"], part / TENSORS)
    return ()


def _config(lora: LoraFolder, row: dict[str, Any], count: int) -> dict[str, Any]:
    """The config: the names of modules, and from which layer on there are any. PSG521."""
    keys, first = set[str](), count
    for module in lora.layers:
        found = in_layer(module, row["layers"])
        if found is None and module not in row["outside"]:
            raise unsaid(f"{PROGRAM} has no '{module}'")
        keys.add(module if found is None else found[1])
        first = first if found is None else min(first, found[0])
    rank = max(layer.rank for layer in lora.layers.values())
    parameters = {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)}
    return {
        "fine_tune_type": "lora",
        "num_layers": count - first,
        "lora_parameters": parameters,
        "model": lora.config.get("base_model_name_or_path"),
    }


def _write(lora: LoraFolder, rank: int, file: Path) -> None:
    """The tensors: lora_a is (in, rank), lora_b (rank, out)."""
    described: list[tuple[str, str, tuple[int, ...]]] = []
    for layer in lora.layers.values():
        described.append((f"{layer.module}.lora_a", "F32", (layer.down.shape[1], rank)))
        described.append((f"{layer.module}.lora_b", "F32", (rank, layer.up.shape[0])))
    with file.open("wb") as stream:
        stream.write(header_of(laid_out(described), {"format": "mlx"}))
        for layer in lora.layers.values():
            for value in padded(layer, rank):
                stream.write(np.ascontiguousarray(value.T, np.float32).tobytes())
