"""Stacks that a model's files hold as a tensor for each expert, and where each lies in the stack.

transformers joins and splits them by tables of its own. What it makes of a stack is asked: stacks
of row numbers are split as they would be saved, and the numbers that come out tell the place of
each piece. They have one column, so they are small whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

Piece = tuple[str, int, int, int]


def stacked_pieces(model: PreTrainedModel, names: Collection[str]) -> dict[str, tuple[Piece, ...]]:
    """The pieces of stacks (experts, rows, columns), by the parameters' names.

    A piece is the name of its tensor, its expert, and its first and last row, the last one not
    included. Parameters that are no stacks, or are not split so, are left out.
    """
    found = {}
    for name in names:
        shape = model.get_parameter(name).shape
        pieces = _pieces(model, name, *shape) if len(shape) == 3 else None
        if pieces is not None:
            found[name] = pieces
    return found


def _pieces(
    model: PreTrainedModel, name: str, experts: int, rows: int, columns: int
) -> tuple[Piece, ...] | None:
    numbers = torch.arange(experts * rows).reshape(experts, rows, 1)
    try:
        split: dict[str, Any] = revert_weight_conversion(model, {name: numbers})
        whole = {k: tuple(v.shape) for k, v in _on_meta(model, name, experts, rows, columns)}
    except (ArithmeticError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return None
    found = []
    for key, value in split.items():
        flat = value.reshape(-1)
        first, count = int(flat[0]), len(flat)
        is_run = torch.equal(flat, torch.arange(first, first + count))
        is_within = first // rows == (first + count - 1) // rows
        if value.shape != (count, 1) or whole.get(key) != (count, columns) or not is_run:
            return None
        if not is_within:
            return None
        found.append((key, first // rows, first % rows, first % rows + count))
    is_all = sum(end - start for _, _, start, end in found) == experts * rows
    return tuple(found) if is_all and len(found) >= experts else None


def _on_meta(model: PreTrainedModel, name: str, experts: int, rows: int, columns: int) -> Any:
    """What a stack is split into, as shapes."""
    stack = torch.empty(experts, rows, columns, device="meta")
    return revert_weight_conversion(model, {name: stack}).items()
