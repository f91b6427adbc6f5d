"""A rule file in words and maths, as ``peftsurgery rules show`` prints it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from peftsurgery.language.expression import within
from peftsurgery.language.maths import maths
from peftsurgery.language.rule_file import RuleFile
from peftsurgery.language.schema import Expect, Pattern, Rule
from peftsurgery.language.settings import resolve_settings
from peftsurgery.language.where import Where


def describe_rules(file: RuleFile) -> str:
    """The file's purpose, settings, and for each rule what it matches, adds, computes and folds."""
    return "\n".join(_lines(file))


def parameter_count(rule: Rule) -> str:
    """How many numbers a rule adds at one site, as a formula over sizes and settings."""
    terms = ["·".join(f"({s.text})" if len(s.names) > 1 else s.text for s in p.shape) or "1"
             for p in rule.params.values()]  # fmt: skip
    return " + ".join(terms) or "0"


def describe_where(where: Where) -> str:
    """The clauses of a ``where`` in words."""
    return " and ".join(_clauses(where)) or "all of them"


def describe_expect(expect: Expect) -> str:
    """What a rule expects to match, in words."""
    given = expect.model_dump(exclude_none=True)
    return ", ".join(f"{key.replace('_', ' ')} {count}" for key, count in given.items())


def _lines(file: RuleFile) -> Iterator[str]:
    yield file.name
    if file.about:
        yield f"  {' '.join(file.about.split())}"
    if file.with_:
        yield "  settings: " + ", ".join(f"{name} = {value}" for name, value in file.with_.items())
    settings = resolve_settings(file)
    for name, expression in file.let.items():
        yield f"  {name} = {maths(expression, settings)}"
    for number, rule in enumerate(file.rules, 1):
        yield ""
        yield f"  {number}. {describe_sites(rule)}"
        yield from (f"     {name} {text}" for name, text in rule_facts(rule, settings))
    if file.flat is not None:
        values = {**file.flat.settings, **file.flat.params}
        given = ", ".join(f"{name} = {value}" for name, value in values.items())
        yield f"  trained, it is {file.flat.rule} with {given}"


def describe_sites(rule: Rule) -> str:
    """The kind of site that a rule matches, and which of them, in words."""
    pattern = f" {rule.match.pattern}" if isinstance(rule.match, Pattern) else ""
    return f"{rule.kind.name}{pattern}: {describe_where(rule.where)}"


def rule_facts(rule: Rule, settings: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """What a rule does at its sites: for each fact what it is about, and the words or maths."""
    if rule.when is not None:
        yield "only if", f"{rule.when}"
    yield "expects", describe_expect(rule.expect)
    if rule.over:
        yield "over the adapters", f"{' and '.join(rule.over)}, whose values are `outputs`"
    for name, param in rule.params.items():
        shape = ", ".join(str(size) for size in param.shape)
        kept = "" if param.train else ", and not trained"
        groups = "all sites" if param.shared is True else f"all sites of equal {param.shared}"
        kept += f", one for {groups}" if param.shared else ""
        yield f"adds {name}", f"[{shape}], initially {param.init}{kept}"
    if rule.params:
        yield "parameters at each site:", parameter_count(rule)
    functions = rule.kind.functions
    scalars = within(rule.let, {*settings, *rule.kind.sizes})
    for name, expression in rule.let.items():
        yield f"with {name} =", maths(expression, settings, scalars, functions)
    for name, expression in rule.rewrite.items():
        yield f"{name} ←", maths(expression, settings, scalars, functions)
    for name, expression in rule.fold.items():
        yield f"folds into {name} ←", maths(expression, settings, scalars)
    for name, expression in rule.penalty.items():
        yield f"adds to the loss the {name} of", maths(expression, settings, scalars)
    if rule.ranks is not None:
        yield "ranks may be taken away:", f"those that lose are zero in {rule.ranks.zero}"
    for name, expression in rule.store.items():
        yield f"keeps {name} as", f"{expression}"
    if rule.train:
        yield "trains", "the model's own parameters there"


def _clauses(where: Where) -> Iterator[str]:
    for key, value in where.given().items():
        if isinstance(value, Where):
            yield f"{key.replace('_', ' ')} ({describe_where(value)})"
        elif key in ("all", "any"):
            parts = [f"({describe_where(part)})" for part in value]
            yield (" and " if key == "all" else " or ").join(parts)
        elif key == "facts":
            yield from (f"{name} is {fact}" for name, fact in value.items())
        elif isinstance(value, tuple):
            yield f"{key} {' or '.join('any' if item is None else str(item) for item in value)}"
        else:
            yield f"{key} {value}"
