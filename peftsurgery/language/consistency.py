"""Name checks: each expression of a rule file reads only names that exist for it.

A rewrite sees everything. A fold and a penalty see the weights, not the values that flow. An
initial value sees the weights and the parameters before its own. A shape sees numbers. A ``let``
name can be used wherever all that it depends on can.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.language.expression import Expression, check_calls, check_names
from peftsurgery.language.initial import FROM_WEIGHTS, INITIALISERS
from peftsurgery.language.operators import OPERATORS
from peftsurgery.language.pattern import compile_pattern
from peftsurgery.language.reserved import check_reachable
from peftsurgery.language.storage import STORES
from peftsurgery.language.strict import place_of
from peftsurgery.language.where import check_settings

if TYPE_CHECKING:
    from peftsurgery.language.schema import Ranks, Rule, RuleFile

OUTPUTS = "outputs"
"""What a rule `over` other adapters calls their values."""


def check_file(file: RuleFile) -> None:
    """Refuse a file whose names do not fit: PSG106, PSG113, PSG114 or PSG120."""
    _check_words(file.with_, (), "setting")
    for setting in file.with_:
        check_reachable(setting)
    _check_words(file.let, file.with_, "let")
    numbers: set[str] = set(file.with_)
    for name, expression in file.let.items():
        _check(expression, numbers)
        numbers.add(name)
    for where in (*file.roles.values(), *(rule.where for rule in file.rules)):
        check_settings(where, file.with_)
    for expression in file.flat.settings.values() if file.flat is not None else ():
        _check(expression, numbers)
    for name in file.checkpoint:
        _check_keys(file.implied(name), file.with_, f"`checkpoint: {name}` implies")
    for rule in file.rules:
        check_settings(rule.over, file.with_, "over")
        check_rule(rule, numbers)
        if file.flat is not None and rule.params:
            known = {*numbers, *rule.kind.sizes, *rule.params}
            for expression in file.flat.params.values():
                _check(expression, within(rule.let, known))


def check_rule(rule: Rule, numbers: Collection[str]) -> None:
    """Check one rule, given the settings and numbers of its file."""
    kind, params = rule.kind, set(rule.params)
    values = {*kind.names, *([OUTPUTS] if rule.over else [])}
    if rule.pattern is not None:
        compile_pattern(rule.pattern)
    _check_targets(rule)
    for name in numbers:
        if name in kind.names:
            message = f"'{name}' is bound by every match of {kind.name}, and a setting of the file"
            raise SurgeryError("PSG106", message, "call the setting otherwise", place_of(name))
    if rule.when is not None:
        _check(rule.when, numbers)
    _check_words(rule.params, {*numbers, *values}, "parameter")
    _check_words(rule.let, {*numbers, *values, *params}, "let")
    everything, calls = {*numbers, *values, *params}, {*OPERATORS, *kind.functions}
    for name, expression in rule.let.items():
        _check(expression, everything, calls)
        everything.add(name)
    sizes = within(rule.let, {*numbers, *kind.sizes})
    known = {*numbers, *kind.sizes, *_foldable(rule)}
    for name, param in rule.params.items():
        shared = () if isinstance(param.shared, bool) else (param.shared,)
        for number in (*param.shape, *shared):
            _check(number, sizes)
        initial = within(rule.let, known)
        _check(param.init, {*initial, *INITIALISERS}, {*OPERATORS, *INITIALISERS, *FROM_WEIGHTS})
        known.add(name)
    for name, expression in rule.rewrite.items():
        early = {*numbers, *values, *params} - {*kind.after(name)}
        _check(expression, within(rule.let, early), calls)
    for expression in (*rule.fold.values(), *rule.penalty.values()):
        _check(expression, within(rule.let, known))
    for expression in rule.store.values():
        _check(expression, numbers, STORES)
    if rule.ranks is not None:
        _check_ranks(rule.ranks, rule, numbers)


def _check_ranks(ranks: Ranks, rule: Rule, numbers: Collection[str]) -> None:
    """Ranks are counted along dimensions that there are, and every number is one of settings."""
    _check_keys(ranks.axes, rule.params, "`ranks:` counts along")
    _check_keys([ranks.zero], ranks.axes, "`ranks:` sets to zero")
    for name, axis in ranks.axes.items():
        if not 0 <= axis < len(rule.params[name].shape):
            message = f"'{name}' has no dimension {axis}"
            raise SurgeryError("PSG106", message, where=place_of(name))
    for key in type(ranks).model_fields.keys() - {"axes", "zero"}:
        _check(getattr(ranks, key), numbers)


def within(let: Mapping[str, Expression], names: Iterable[str]) -> set[str]:
    """``names`` and the let names that can be computed from them alone."""
    known = set(names)
    for name, expression in let.items():
        if known.issuperset(expression.names):
            known.add(name)
    return known


def _check(
    expression: Expression, names: Collection[str], calls: Collection[str] = OPERATORS
) -> None:
    check_calls(expression, calls)
    check_names(expression, names)


def _foldable(rule: Rule) -> tuple[str, ...]:
    """The names that a fold may read and replace; of a pattern, whatever it binds."""
    kind = rule.kind
    return kind.values if kind.name == "pattern" else kind.weights


def _check_words(words: Mapping[str, Any], taken: Collection[str], what: str) -> None:
    for word in words:
        if not word.isidentifier() or not word.isascii() or word.startswith("__"):
            message = f"'{word}' cannot be the name of a {what}"
            raise SurgeryError("PSG106", message, where=place_of(word))
        if word in taken:
            message = f"the {what} '{word}' hides another name"
            raise SurgeryError("PSG106", message, "choose another name", place_of(word))


def _check_targets(rule: Rule) -> None:
    kind, place = rule.kind, place_of(rule.match)
    if not rule.rewrite and not rule.train and not rule.store:
        message = f"a rule that matches {kind.name} and does nothing to it"
        hint = "give it `rewrite:`, `store:` or `train: true`"
        raise SurgeryError("PSG106", message, hint, place)
    if rule.fold and not rule.rewrite:
        raise SurgeryError("PSG106", "a `fold:` without its `rewrite:`", where=place)
    if rule.over and (rule.fold or rule.rewrite.keys() != {kind.result}):
        message = (
            f"a rule `over` other adapters rewrites {kind.result} alone and folds into nothing"
        )
        raise SurgeryError("PSG106", message, where=place_of(rule.over[0]))
    _check_keys(rule.rewrite, {*kind.values, *kind.weights}, "`rewrite:` gives")
    _check_keys(rule.fold, _foldable(rule), "`fold:` gives")
    _check_keys(rule.store, kind.weights, "`store:` gives")
    for name, keys in rule.checkpoint.items():
        _check_keys(keys, {*rule.params, "modules", "table"}, f"`checkpoint: {name}` names")


def _check_keys(given: Iterable[str], known: Collection[str], verb: str) -> None:
    for key in given:
        if key not in known:
            hint = did_you_mean(key, known) if known else None
            raise SurgeryError("PSG106", f"{verb} '{key}', which is not bound", hint, place_of(key))
