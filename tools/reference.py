"""The generated parts of rules/README.md: tables made of the language's own.

    python -m tools.reference            write them again, between their markers
    python -m tools.reference --check    exit with 1 if the file is not current

A part stands between ``<!-- made: NAME -->`` and ``<!-- end -->``. What a key or a function does is
said by its docstring in the package; the examples, whose results are computed, are here.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftsurgery.language.activations import ACTIVATIONS
from peftsurgery.language.evaluation import evaluate
from peftsurgery.language.expression import parse
from peftsurgery.language.initial import FROM_WEIGHTS, INITIALISERS, initial
from peftsurgery.language.kinds import KINDS
from peftsurgery.language.operators import OPERATORS, Operator
from peftsurgery.language.roles import VOCABULARY
from peftsurgery.language.rule_file import json_schema
from peftsurgery.language.storage import STORES, storage_of
from tools.reference_examples import (
    FACTS,
    INITIALISER_EXAMPLES,
    OPERATOR_EXAMPLES,
    SITE_EXAMPLES,
    SITE_VALUES,
    STORE_EXAMPLES,
    VALUES,
)

PAGE = Path(__file__).resolve().parents[1] / "rules" / "README.md"
PART = re.compile(r"(<!-- made: (\w+)(?: (\w+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> int:
    """Write the parts, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    given = parser.parse_args()
    old = PAGE.read_text(encoding="utf-8")
    new = current(old)
    if new != old and not given.check:
        PAGE.write_text(new, encoding="utf-8")
    return int(given.check and new != old)


def current(text: str) -> str:
    """The page with every generated part as the package has it now."""

    def made(match: re.Match[str]) -> str:
        head, name, argument, end = match.groups()
        lines = PARTS[name](argument) if argument else PARTS[name]()
        return "\n".join([head, *lines, "", end])

    return PART.sub(made, text)


def shipped_operators() -> dict[str, Operator]:
    """The operators that come with the package, without those registered by others."""
    return {
        name: one
        for name, one in sorted(OPERATORS.items())
        if one.function.__module__.startswith("peftsurgery.")
    }


def keys(schema: str) -> list[str]:
    """The keys of a mapping of rule files."""
    whole = json_schema()
    part = whole if schema == "RuleFile" else whole["$defs"][schema]
    needed = part.get("required", ())
    rows = [
        (f"`{key}`" + (" (needed)" if key in needed else ""), takes(about), about_of(about))
        for key, about in part["properties"].items()
    ]
    return table(("key", "takes", "what it says"), rows)


def about_of(schema: Mapping[str, Any]) -> str:
    """What a key means, with its default."""
    text = " ".join(schema.get("description", "").split())
    default = schema.get("default")
    plain = isinstance(default, str | int) and default != ""
    return f"{text} Default: {str(default).lower()}." if plain else text


SCALARS = ("true, false", "whole number", "number", "text")


def takes(schema: Mapping[str, Any]) -> str:
    """What may stand behind a key, in words."""
    if "anyOf" in schema:
        parts = dict.fromkeys(takes(one) for one in schema["anyOf"])
        given = [part for part in parts if part != "null"]
        rest = [part for part in given if part not in SCALARS]
        if len(given) - len(rest) == len(SCALARS):
            given = ["value", *(part for part in rest if part != "list of: value")]
        return " or ".join(given)
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if "$ref" in schema:
        word = str(schema["$ref"]).rpartition("/")[2].lower()
        return {"where": "clauses", "pattern": "{pattern: expression}"}.get(word, word)
    match schema.get("type"):
        case ["string", "number"]:
            return "expression"
        case "array":
            return f"list of: {takes(schema['items'])}"
        case "object":
            inner = schema["additionalProperties"]
            return "mapping" if inner is True else f"mapping of names to: {takes(inner)}"
        case other:
            words = {"string": "text", "boolean": "true, false", "integer": "whole number"}
            return words.get(str(other), str(other))


def kind(name: str) -> list[str]:
    """What the sites of a kind bind, and what a rule may call there."""
    one = KINDS[name]
    optional = [f"{value}?" if value in one.optional else value for value in one.values]
    shown = {
        "values": optional,
        "weights": one.weights,
        "sizes": one.sizes,
        "a plain `rewrite` gives": [one.result] if one.result else [],
    }
    rows = [(what, ", ".join(f"`{word}`" for word in words)) for what, words in shown.items()]
    rows += [(f"fact `{fact}`", about) for fact, about in FACTS[name].items()]
    lines = table(("binds", ""), [row for row in rows if row[1]])
    if one.functions:
        bound = {**SITE_VALUES[name]}
        lines += ["", *_values(bound), ""]
        examples = SITE_EXAMPLES[name]
        lines += functions(sorted(one.functions.items()), examples, bound, one.functions)
    return lines


def operators() -> list[str]:
    """The operators, each with an example."""
    shipped = shipped_operators()
    return [
        *_values(VALUES),
        "",
        *functions(shipped.items(), OPERATOR_EXAMPLES, VALUES, shipped),
    ]


def functions(
    entries: Iterable[tuple[str, Operator]],
    examples: Mapping[str, str],
    bound: Mapping[str, Any],
    more: Mapping[str, Operator],
) -> list[str]:
    """A table of what can be called: the call, what it gives, and an example with its result."""
    calls = {**OPERATORS, **more}
    rows = []
    for name, one in entries:
        result = evaluate(parse(examples[name]), bound, calls)
        rows.append((f"`{one.usage}`", plain(one.doc), f"`{examples[name]}` is {shown(result)}"))
    return table(("call", "what it gives", "example"), rows)


def initialisers() -> list[str]:
    """What a parameter can start as; the examples are of shape [2, 3], from a weight W."""
    bound = {"W": torch.arange(6.0).reshape(2, 3), "places": [1]}
    rows = []
    for name, draw in sorted({**INITIALISERS, **FROM_WEIGHTS}.items()):
        text = INITIALISER_EXAMPLES[name]
        one, other = (
            initial(parse(text), (2, 3), bound, generator=torch.Generator().manual_seed(seed))
            for seed in (0, 1)
        )
        value = shown(one) if torch.equal(one, other) else "drawn at random"
        arguments = list(inspect.signature(draw).parameters.values())[2:]
        usage = inspect.Signature([p.replace(annotation=p.empty) for p in arguments])
        call = f"{name}{usage}" if arguments else name
        rows.append((f"`{call}`", plain(inspect.getdoc(draw) or ""), f"`{text}`: {value}"))
    return table(("initialiser", "what it gives", "example"), rows)


def stores() -> list[str]:
    """How a weight that is not trained can be kept."""
    rows = []
    for name, one in sorted(STORES.items()):
        kept = storage_of(parse(STORE_EXAMPLES[name]), {})
        said = ", ".join(f"{key} {value}" for key, value in vars(kept).items())
        rows.append((f"`{one.usage}`", plain(one.doc), f"`{STORE_EXAMPLES[name]}`: {said}"))
    return table(("call", "what it keeps", "example"), rows)


def activations() -> list[str]:
    """The names that `activation` takes."""
    return words(ACTIVATIONS)


def roles() -> list[str]:
    """The roles that the graph's dataflow gives."""
    return words(VOCABULARY)


def words(names: Iterable[str]) -> list[str]:
    """Names one after the other."""
    return textwrap.wrap(", ".join(f"`{name}`" for name in names) + ".", 100)


PARTS: Mapping[str, Callable[..., list[str]]] = {
    "keys": keys,
    "kind": kind,
    "operators": operators,
    "initialisers": initialisers,
    "stores": stores,
    "activations": activations,
    "roles": roles,
}


def _values(bound: Mapping[str, Any]) -> Iterator[str]:
    parts = ", ".join(f"`{name}` is {shown(value)}" for name, value in bound.items())
    yield f"In the examples {parts}."


def plain(doc: str) -> str:
    """A docstring as one line of plain text."""
    text = " ".join(doc.split())
    return re.sub(r":\w+:`~?\.?([^`]*)`", r"`\1`", text).replace("``", "`")


def shown(value: Any) -> str:
    """A result: small ones by their numbers, larger ones by their shape."""
    if isinstance(value, Tensor) and value.numel() > 6:
        return "of shape [" + ", ".join(map(str, value.shape)) + "]"
    numbers = value.tolist() if isinstance(value, Tensor) else value
    return f"`{_rounded(numbers)}`"


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    if isinstance(value, float):
        number = round(value, 3)
        return int(number) if number == int(number) else number
    return value


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Rows as a table of Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines]


if __name__ == "__main__":
    sys.exit(main())
