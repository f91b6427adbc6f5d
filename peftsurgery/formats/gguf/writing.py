"""An adapter as llama.cpp loads it: ``llama-cli --lora adapter.gguf``.

llama.cpp scales a pair by alpha over its rank, and by 1 where alpha is 0; it knows one alpha. So
the scale of each layer is in its ``lora_b``, and alpha is the rank if there is one, else 0. Names
and the order of rows are in ``architectures.yaml``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftsurgery.checkpoint.arrays import Array
from peftsurgery.checkpoint.lora_folder import LoraFolder, LoraLayer
from peftsurgery.formats.gguf.file import GgufTensor, gguf_bytes
from peftsurgery.formats.plain_lora import (
    check_alone,
    check_flat,
    config_number,
    in_layer,
    model_type,
    one_file,
    padded,
    places_read,
    plain_lora,
    row_of,
    unsaid,
)
from peftsurgery.formats.words import words_of
from peftsurgery.surgery.model.operated import OperatedModel

FILE, LAYERS, PROGRAM = "adapter.gguf", "model.layers", "llama.cpp"


def to_gguf(model: OperatedModel, out: Path, name: str | None, force: bool) -> tuple[str, ...]:
    """Write the adapter to the file ``out``, or into the directory ``out``.

    PSG521 for a layer that llama.cpp does not load, PSG522 for an architecture without a table.
    """
    words = words_of(Path(__file__).with_name("architectures.yaml"))
    row = row_of(model, words["architectures"], model_type(model), PROGRAM)
    with plain_lora(model, name) as lora:
        tensors = [
            tensor for layer in lora.layers.values() for tensor in _tensors(model, layer, row)
        ]
        with one_file(out, FILE, force, places_read(model)) as file, file.open("wb") as stream:
            for block in gguf_bytes(_keys(lora, row), tensors):
                stream.write(block)
    return ()


def _keys(lora: LoraFolder, row: dict[str, Any]) -> dict[str, str | float]:
    ranks = {layer.rank for layer in lora.layers.values()}
    return {
        "general.architecture": row["arch"],
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(ranks.pop()) if len(ranks) == 1 else 0.0,
    }


def _tensors(model: OperatedModel, layer: LoraLayer, row: dict[str, Any]) -> list[GgufTensor]:
    """A layer's two tensors. PSG521 if llama.cpp has no name for its module."""
    check_flat(layer, PROGRAM)
    check_alone(model, layer, PROGRAM)
    found = in_layer(layer.module, LAYERS)
    short = row["outside"].get(layer.module) if found is None else row["names"].get(found[1])
    if short is None or layer.kind == "embedding":
        raise unsaid(f"{PROGRAM} loads no adapter of '{layer.module}'")
    heads = row.get("interleaved", {}).get(short)
    count = None if heads is None else config_number(model, heads)
    full = short if found is None else f"blk.{found[0]}.{short}"

    def up() -> Array:
        value = padded(layer, layer.rank)[1]
        return value if count is None else interleaved(value, count)

    return [
        GgufTensor(f"{full}.weight.lora_a", layer.down.shape, lambda: layer.read()[0]),
        GgufTensor(f"{full}.weight.lora_b", layer.up.shape, up),
    ]


def interleaved(value: Array, heads: int) -> Array:
    """Rows (heads, 2, half) in the order (heads, half, 2): a head's two halves, one by one."""
    parts = value.reshape(heads, 2, -1, value.shape[-1])
    return parts.swapaxes(1, 2).reshape(value.shape)
