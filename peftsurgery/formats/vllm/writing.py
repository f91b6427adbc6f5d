"""A peft directory within the rules of vLLM: one rank, one alpha, nothing that is ignored.

Older versions drop rank_pattern and alpha_pattern without a word, so every layer is given the
largest rank, by zeros, and the scale 1, the rest in its ``up``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from peftsurgery.checkpoint.lora_folder import LoraFolder, NewLayer, write_lora
from peftsurgery.formats.plain_lora import check_flat, padded, places_read, plain_lora, unsaid
from peftsurgery.formats.words import words_of
from peftsurgery.outputs import fresh
from peftsurgery.surgery.model.operated import OperatedModel

KEPT = ("base_model_name_or_path", "target_modules", "fan_in_fan_out", "auto_mapping")


def to_vllm(model: OperatedModel, out: Path, name: str | None, force: bool) -> tuple[str, ...]:
    """Write the adapter to the directory ``out``; returns notes. PSG521 for a rank it has not."""
    words = words_of(Path(__file__).with_name("library.yaml"))
    with plain_lora(model, name) as lora:
        rank = max(layer.rank for layer in lora.layers.values())
        served = next((each for each in words["ranks"] if each >= rank), None)
        if served is None:
            why = f"its rank is {rank}, and vLLM serves at most {max(words['ranks'])}"
            raise unsaid(why, f"as_lora(model, rank={max(words['ranks'])}) makes a smaller one")
        for layer in lora.layers.values():
            check_flat(layer, "vLLM")
        with fresh(out, places_read(model), force) as part:
            kept = {key: lora.config[key] for key in KEPT if key in lora.config}
            write_lora(part, _layers(lora, rank), kept)
    notes = [] if served <= words["usual"] else [f"serve it with --max-lora-rank {served}"]
    tables = [layer.module for layer in lora.layers.values() if layer.kind == "embedding"]
    if tables:
        notes.append(f"vLLM takes '{tables[0]}' only of models that list it as an embedding module")
    return tuple(notes)


def _layers(lora: LoraFolder, rank: int) -> Iterator[NewLayer]:
    for layer in lora.layers.values():
        yield NewLayer(layer.module, layer.kind, *padded(layer, rank))
