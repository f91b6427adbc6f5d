"""The language of rules: schema, expressions and their readings, selection."""

from peftsurgery.language import activations as activations
from peftsurgery.language import builtin_operators as builtin_operators
