"""rule_entries: what two rule files say otherwise, in the words and the maths of ``rules show``.

Rules are paired in order, those that say the same first and then those for one kind of site. Where
a pair computes by other expressions or settings, random tensors tell whether it is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from itertools import repeat
from typing import Any

from peftsurgery.diff.algebra import DIFFERS, RuleWithSettings, compare_algebra
from peftsurgery.diff.lines import Entry
from peftsurgery.errors import SurgeryError
from peftsurgery.language.describe import describe_sites, describe_where, rule_facts
from peftsurgery.language.rule_file import RuleFile
from peftsurgery.language.schema import Rule
from peftsurgery.language.settings import resolve_settings

Facts = Mapping[str, str]
Places = tuple[int | None, int | None]
SITES = "is about"


def rule_entries(a: RuleFile, b: RuleFile) -> Iterator[Entry]:
    """(part, sign, place, text) for every fact of the files and their rules that is another.

    ``part`` is ``rule`` for what the files say, and ``algebra`` for what random tensors say of it.
    """
    yield from _changed("file", _file_facts(a), _file_facts(b))
    if a.about.split() != b.about.split():
        yield "rule", "~", "file", "about is another text"
    defaults = [{name: repr(value) for name, value in file.with_.items()} for file in (a, b)]
    yield from _changed("settings", *defaults)
    facts = [[_facts(rule, resolve_settings(f)) for rule in f.rules] for f in (a, b)]
    for one, other in _pairs(*facts):
        old = {} if one is None else facts[0][one]
        new = {} if other is None else facts[1][other]
        place = _place(one, other)
        yield from _changed(place, old, new)
        if one is not None and other is not None and (old != new or defaults[0] != defaults[1]):
            for text in _verdicts((a, b), (a.rules[one], b.rules[other])):
                yield "algebra", "~", place, text


def _place(one: int | None, other: int | None) -> str:
    if one is None or other is None or one == other:
        return f"rule {1 + max(-1 if one is None else one, -1 if other is None else other)}"
    return f"rule {one + 1}, now {other + 1}"


def _file_facts(file: RuleFile) -> dict[str, str]:
    """What a file says besides its settings and rules."""
    found = {"name": file.name}
    found |= {f"{name} =": str(expression) for name, expression in file.let.items()}
    found |= {f"the role {name} is": describe_where(each) for name, each in file.roles.items()}
    found |= {f"in {name} files": repr(table) for name, table in file.checkpoint.items()}
    if file.flat is not None:
        values = {**file.flat.settings, **file.flat.params}
        given = ", ".join(f"{name} = {value}" for name, value in values.items())
        found["trained, it is"] = f"{file.flat.rule} with {given}"
    return found


def _facts(rule: Rule, settings: Mapping[str, Any]) -> dict[str, str]:
    """What a rule says: the sites, what it does there, what files call its parameters."""
    names = {f"in {name} files": repr(table) for name, table in rule.checkpoint.items()}
    return {SITES: describe_sites(rule), **dict(rule_facts(rule, settings)), **names}


def _changed(place: str, old: Facts, new: Facts) -> Iterator[Entry]:
    for name in dict.fromkeys((*old, *new)):
        if name not in old:
            yield "rule", "+", place, f"{name} {new[name]}"
        elif name not in new:
            yield "rule", "-", place, f"{name} {old[name]}"
        elif old[name] != new[name]:
            yield "rule", "~", place, f"{name} {new[name]} (was {old[name]})"


def _pairs(ones: Sequence[Facts], others: Sequence[Facts]) -> Iterator[Places]:
    """The places of rules that are each other, in order; None where there is none."""
    whole = _matched([repr(f) for f in ones], [repr(f) for f in others])
    for what, first, end, start, last in whole.get_opcodes():
        left, right = range(first, end), range(start, last)
        if what == "equal":
            yield from zip(left, right, strict=True)
            continue
        kinds, others_kinds = (
            [side[place][SITES].partition(":")[0] for place in places]
            for side, places in ((ones, left), (others, right))
        )
        for same, i, j, k, m in _matched(kinds, others_kinds).get_opcodes():
            if same == "equal":
                yield from zip(left[i:j], right[k:m], strict=True)
            else:
                yield from zip(left[i:j], repeat(None))
                yield from zip(repeat(None), right[k:m])


def _matched(ones: Sequence[str], others: Sequence[str]) -> SequenceMatcher[str]:
    return SequenceMatcher(None, ones, others, autojunk=False)


def _verdicts(files: tuple[RuleFile, RuleFile], rules: tuple[Rule, Rule]) -> Iterator[str]:
    """What random tensors say of two rules: with the first one's settings, and with their own."""
    try:
        own = [resolve_settings(file) for file in files]
        shared = {k: v for k, v in files[0].with_.items() if k in files[1].with_}
        equal = resolve_settings(files[1], shared)
    except SurgeryError as error:
        yield f"cannot be said: {error.message}"
        return
    one = RuleWithSettings(rules[0], own[0])
    verdicts = [
        dict(compare_algebra(one, RuleWithSettings(rules[1], settings)))
        for settings in (equal, own[1])
    ]
    for reading, verdict in verdicts[0].items():
        told = verdicts[1][reading]
        yield f"{reading}: {verdict}" + (", with equal settings" if told != verdict else "")
        if told != verdict and not verdict.startswith(DIFFERS):
            yield f"{reading}: {told}, with the settings of each"
