"""compare_files: two rule files or two safetensors files, of which no model is captured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from peftsurgery.diff.lines import folded_lines
from peftsurgery.diff.rules import rule_entries
from peftsurgery.diff.summary import Summary
from peftsurgery.diff.weights import Entry, compare_weights, weight_entries
from peftsurgery.errors import SurgeryError
from peftsurgery.fingerprint import Sampled, in_file
from peftsurgery.language.loading import load_rules
from peftsurgery.language.shipped import shipped

RULES, TENSORS = (".yaml", ".yml"), (".safetensors",)


def are_files(a: str | Path, b: str | Path) -> bool:
    """Whether two paths are files that are compared as such. PSG905 for two of different kinds."""
    kinds = [_kind(Path(path)) for path in (a, b)]
    if kinds[0] != kinds[1]:
        what = " and ".join(
            f"'{path}' is {kind or 'a model'}" for path, kind in zip((a, b), kinds, strict=True)
        )
        raise SurgeryError("PSG905", what, "compare two of one kind")
    return kinds[0] is not None


def compare_files(a: Path, b: Path, weights: bool = False) -> Summary:
    """What is different between two files of one kind; ``weights`` compares tensors' values too.

    PSG207 for a safetensors file that is damaged, and what :func:`load_rules` raises.
    """
    names = str(a), str(b)
    if _kind(a) == "a rule file":
        lines = folded_lines(rule_entries(*(load_rules(name) for name in names)))
        return Summary(names, None, lines, _differs(bool(lines), False))
    one, other = (in_file(path) for path in (a, b))
    changes = compare_weights(one, other, {}) if weights else None
    lines = folded_lines(_headers(one, other))
    lines += folded_lines(weight_entries(changes or ()))
    changed = any(line.part == "weight" for line in lines)
    structure = any(line.part == "tensor" for line in lines)
    return Summary(names, None, lines, _differs(structure, changed), changes)


def _kind(path: Path) -> str | None:
    if path.suffix in RULES or (str(path) in shipped() and not path.exists()):
        return "a rule file"
    return "a file of tensors" if path.suffix in TENSORS else None


def _differs(structure: bool, weights: bool) -> dict[str, bool]:
    return {"structure": structure, "config": False, "weights": weights}


def _headers(a: dict[str, Sampled], b: dict[str, Sampled]) -> Iterator[Entry]:
    for name in {**a, **b}:
        old, new = (_header(side[name]) if name in side else "" for side in (a, b))
        if old != new:
            sign = "~" if old and new else "-" if old else "+"
            yield "tensor", sign, name, f"{old} → {new}" if sign == "~" else old or new


def _header(tensor: Sampled) -> str:
    return f"{tensor.dtype}[{', '.join(map(str, tensor.shape))}]"
