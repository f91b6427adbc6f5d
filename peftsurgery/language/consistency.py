"""Name checks: each expression of a rule file reads only names that exist for it.

A rewrite sees everything. A fold and a penalty see the weights, not the values that flow. An
initial value sees the weights and the parameters before its own. A shape sees numbers. A ``let``
name can be used wherever all that it depends on can.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.language.expression import Expression, check_calls, check_names, within
from peftsurgery.language.initial import FROM_WEIGHTS, INITIALISERS
from peftsurgery.language.operators import OPERATORS, is_word
from peftsurgery.language.pattern import compile_pattern
from peftsurgery.language.position import position_of
from peftsurgery.language.schema import Ranks, Rule
from peftsurgery.language.storage import STORES

OUTPUTS = "outputs"
"""What a rule `over` other adapters calls their values."""

MODEL_FACTS = ("paired", "sites")
"""What an implied setting may read: whether the model is an encoder and a decoder, and at how many
sites the method adds parameters."""


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
            raise SurgeryError("PSG106", message, "call the setting otherwise", position_of(name))
    if rule.when is not None:
        check_expression(rule.when, numbers)
    check_words(rule.params, {*numbers, *values}, "parameter")
    check_words(rule.let, {*numbers, *values, *params}, "let")
    everything, calls = {*numbers, *values, *params}, {*OPERATORS, *kind.functions}
    for name, expression in rule.let.items():
        check_expression(expression, everything, calls)
        everything.add(name)
    sizes = within(rule.let, {*numbers, *kind.sizes})
    known = {*numbers, *kind.sizes, *_foldable(rule)}
    for name, param in rule.params.items():
        shared = () if isinstance(param.shared, bool) else (param.shared,)
        for number in (*param.shape, *shared):
            check_expression(number, sizes)
        words = {*within(rule.let, known), *INITIALISERS}
        check_expression(param.init, words, {*OPERATORS, *INITIALISERS, *FROM_WEIGHTS})
        known.add(name)
    for name, expression in rule.rewrite.items():
        early = {*numbers, *values, *params} - {*kind.after(name)}
        check_expression(expression, within(rule.let, early), calls)
    for expression in (*rule.fold.values(), *rule.penalty.values()):
        check_expression(expression, within(rule.let, known))
    for expression in rule.store.values():
        check_expression(expression, numbers, STORES)
    if rule.ranks is not None:
        _check_ranks(rule.ranks, rule, numbers)


def _check_ranks(ranks: Ranks, rule: Rule, numbers: Collection[str]) -> None:
    """Ranks are counted along dimensions that there are, and every number is one of settings."""
    check_keys(ranks.axes, rule.params, "`ranks:` counts along")
    check_keys([ranks.zero], ranks.axes, "`ranks:` sets to zero")
    for name, axis in ranks.axes.items():
        if not 0 <= axis < len(rule.params[name].shape):
            message = f"'{name}' has no dimension {axis}"
            raise SurgeryError("PSG106", message, where=position_of(name))
    for key in type(ranks).model_fields.keys() - {"axes", "zero"}:
        check_expression(getattr(ranks, key), numbers)


def check_expression(
    expression: Expression, names: Collection[str], calls: Collection[str] = OPERATORS
) -> None:
    """Refuse an expression that reads or calls what is not there: PSG113, PSG114."""
    check_calls(expression, calls)
    check_names(expression, names)


def _foldable(rule: Rule) -> tuple[str, ...]:
    """The names that a fold may read and replace; of a pattern, whatever it binds."""
    kind = rule.kind
    return kind.values if kind.name == "pattern" else kind.weights


def check_words(words: Mapping[str, Any], taken: Collection[str], what: str) -> None:
    """Refuse words that cannot be names, or hide others. PSG106."""
    for word in words:
        if not is_word(word):
            message = f"'{word}' cannot be the name of a {what}"
            raise SurgeryError("PSG106", message, where=position_of(word))
        if word in taken:
            message = f"the {what} '{word}' hides another name"
            raise SurgeryError("PSG106", message, "choose another name", position_of(word))


def _check_targets(rule: Rule) -> None:
    kind, position = rule.kind, position_of(rule.match)
    if not rule.rewrite and not rule.train and not rule.store:
        message = f"a rule that matches {kind.name} and does nothing to it"
        hint = "give it `rewrite:`, `store:` or `train: true`"
        raise SurgeryError("PSG106", message, hint, position)
    if rule.fold and not rule.rewrite:
        raise SurgeryError("PSG106", "a `fold:` without its `rewrite:`", where=position)
    if rule.over and (rule.fold or rule.rewrite.keys() != {kind.result}):
        what = f"rewrites {kind.result} alone and folds into nothing"
        message, where = f"a rule `over` other adapters {what}", position_of(rule.over[0])
        raise SurgeryError("PSG106", message, where=where)
    check_keys(rule.rewrite, {*kind.values, *kind.weights}, "`rewrite:` gives")
    check_keys(rule.fold, _foldable(rule), "`fold:` gives")
    check_keys(rule.store, kind.weights, "`store:` gives")
    for name, keys in rule.checkpoint.items():
        check_keys(keys, {*rule.params, "modules", "table"}, f"`checkpoint: {name}` names")


def check_keys(given: Iterable[str], known: Collection[str], verb: str) -> None:
    """Refuse keys that are not among the known ones. PSG106, with the nearest."""
    for key in given:
        if key not in known:
            hint = did_you_mean(key, known) if known else None
            message = f"{verb} '{key}', which is not bound"
            raise SurgeryError("PSG106", message, hint, position_of(key))
