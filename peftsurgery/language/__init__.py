"""The language of rules: schema, expressions and their readings, selection."""

from peftsurgery.language import standard  # registers the shipped operators
from peftsurgery.language.evaluation import Context, evaluate
from peftsurgery.language.expression import Expression, check_calls, check_names, parse
from peftsurgery.language.initial import INITIALISERS, initial
from peftsurgery.language.operators import OPERATORS, Operator, operator

__all__ = [
    "INITIALISERS",
    "OPERATORS",
    "Context",
    "Expression",
    "Operator",
    "check_calls",
    "check_names",
    "evaluate",
    "initial",
    "operator",
    "parse",
    "standard",
]
