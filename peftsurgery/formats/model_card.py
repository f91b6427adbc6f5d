"""What is written into a folded model's directory about the fold: the record, and a card."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from peftsurgery.checkpoint.card import CARD, card_of
from peftsurgery.checkpoint.record import FILE, as_json
from peftsurgery.surgery.model.fold_record import base_folder, fold_record
from peftsurgery.surgery.model.operated import OperatedModel, active_operations


def write_record(folder: Path, model: OperatedModel) -> None:
    """Write what is folded into a model, and its card unless the base has one of its own."""
    record, base = fold_record(model.source, active_operations(model)), base_folder(model.source)
    (folder / FILE).write_bytes(as_json(record))
    if base is None or not (base / CARD).exists():
        text = card_of(record, isinstance(model.source.module, PreTrainedModel))
        (folder / CARD).write_text(text, encoding="utf-8")
