"""compare_weights: what became of every tensor, in files or in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from peftsurgery.diff.names import without_numbers
from peftsurgery.diff.tensor_change import Change, measure_pair
from peftsurgery.diff.tensor_pair import pair_of_stored
from peftsurgery.fingerprint import Sampled

Entry = tuple[str, str, str, str]
CAST = {"rounding", "identical"}
"""What is said of tensors that only have another dtype."""
WAITING = 2
"""So many threads more than compute: while one waits for the disk, another one has work."""


@dataclass(frozen=True)
class TensorChange:
    """A tensor under its names in both models, and what became of it; None: it is in one only.

    ``source`` is the tensor of the first model that has this content, if that is another one.
    """

    before: str | None
    after: str | None
    dtypes: tuple[str, str]
    change: Change | None
    source: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The change as JSON has it."""
        measures = {} if self.change is None else self.change.to_dict()
        dtypes = list(self.dtypes)
        return {
            "a": self.before,
            "b": self.after,
            "dtypes": dtypes,
            "source": self.source,
            **measures,
        }


def compare_weights(
    a: Mapping[str, Sampled], b: Mapping[str, Sampled], names: Mapping[str, str | None]
) -> list[TensorChange]:
    """The changes of all tensors; ``names`` are those of ``a`` that ``b`` calls otherwise.

    Some more pairs at a time than torch has threads, each read some rows at a time.
    """
    made, seen = list[TensorChange](), set[str]()
    pairs = list[tuple[Sampled, Sampled]]()
    for name, old in a.items():
        other = names.get(name, name)
        new = None if other is None else b.get(other)
        if new is None:
            made.append(TensorChange(name, None, (old.dtype, ""), None))
            continue
        seen.add(str(other))
        made.append(TensorChange(name, other, (old.dtype, new.dtype), None))
        pairs.append((old, new))
    measured = iter(_changes(pairs))
    made = [each if each.after is None else replace(each, change=next(measured)) for each in made]
    made += [TensorChange(None, n, ("", t.dtype), None) for n, t in b.items() if n not in seen]
    return list(_with_sources(made, a, b))


def _changes(pairs: Sequence[tuple[Sampled, Sampled]]) -> list[Change]:
    """The change of each pair; the largest are begun first, so that no thread is last for long."""
    order = sorted(range(len(pairs)), key=lambda number: -pairs[number][0].count)
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads + WAITING, "diff", torch.set_num_threads, (1,)) as pool:
            made = pool.map(lambda number: _change(*pairs[number]), order)
            found = dict(zip(order, made, strict=True))
    finally:
        torch.set_num_threads(threads)  # what a thread says of itself holds for later ones too
    return [found[number] for number in range(len(pairs))]


def _change(old: Sampled, new: Sampled) -> Change:
    if old.shape != new.shape:
        return Change("reshaped")
    pair = pair_of_stored(old, new)
    if pair is not None:
        return measure_pair(pair)
    whole = [each.read([(0, each.count)]) for each in (old, new)]
    same = old.dtype == new.dtype and whole[0] == whole[1]
    return Change("identical" if same else "dense")


def _with_sources(
    made: list[TensorChange], a: Mapping[str, Sampled], b: Mapping[str, Sampled]
) -> Iterator[TensorChange]:
    """Changes with the tensor that the content came from: known by fingerprints, where alone."""
    changed = [e for e in made if e.change is not None and e.change.verdict == "dense"]
    prints: dict[str, list[str]] = {}
    for each in changed:
        prints.setdefault(str(a[str(each.before)].print()), []).append(str(each.before))
    for each in made:
        found = prints.get(str(b[str(each.after)].print()), []) if each in changed else []
        source = found[0] if len(found) == 1 else None
        yield TensorChange(each.before, each.after, each.dtypes, each.change, source)


def weight_entries(changes: Sequence[TensorChange]) -> Iterator[Entry]:
    """(part, sign, name, text) for every tensor that is in both and has other values.

    Tensors that are alike but for the layer have one text, with the largest of their changes.
    """
    alike: dict[tuple[str, str], list[float]] = {}
    changed = [
        (each, each.change)
        for each in changes
        if each.change is not None and each.change.verdict != "reshaped"
    ]
    if _is_cast(changed):
        each, change = max(changed, key=lambda pair: pair[1].relative)
        text = _text(each, change, [pair[1].relative for pair in changed])
        yield "weight", "~", "", f"all {len(changed)} tensors: {text}"
        return
    for each, change in changed:
        alike.setdefault(_alike(each, change), []).append(change.relative)
    for each, change in changed:
        if change.verdict != "identical" or each.dtypes[0] != each.dtypes[1]:
            text = _text(each, change, alike[_alike(each, change)])
            yield "weight", "~", str(each.after), text


def _is_cast(changed: Sequence[tuple[TensorChange, Change]]) -> bool:
    """Whether all that became of several tensors is another dtype, the same for all."""
    dtypes = {each.dtypes for each, _ in changed}
    verdicts = {change.verdict for _, change in changed}
    is_other = all(one != other for one, other in dtypes)
    return len(changed) > 1 and len(dtypes) == 1 and is_other and verdicts <= CAST


def _alike(each: TensorChange, change: Change) -> tuple[str, str]:
    return without_numbers(str(each.after)), f"{change.verdict} {change.rank}"


def _text(each: TensorChange, change: Change, alike: Sequence[float]) -> str:
    """What became of a tensor; ``alike`` are the changes of those it shares a line with."""
    words = {
        "identical": "identical values",
        "rounding": "a rounding",
        "low-rank": f"low-rank (rank {change.rank}), probably a folded adapter",
        "dense": "dense change",
        "not finite": f"NaN or Inf: {change.not_finite[0]} → {change.not_finite[1]}",
    }
    text = words[change.verdict]
    if each.source is not None:
        return f"is what {each.source} was"
    if each.dtypes[0] != each.dtypes[1]:
        text += f", {each.dtypes[0]} → {each.dtypes[1]}"
    largest = 100 * max(alike)
    if not largest:
        return text
    size = f"{largest:.2g}" if largest < 100 else f"{largest:.0f}"
    return f"{text}, {'up to ' if len(alike) > 1 else ''}{size} % of the norm"
