"""The language of rules: schema, expressions and their readings, selection."""

from peftsurgery.language import activations
from peftsurgery.language import builtin_operators as standard
from peftsurgery.language.checking import CheckReport, check_rules
from peftsurgery.language.describe import describe_rules
from peftsurgery.language.environment import Environment, mapped
from peftsurgery.language.evaluation import Context, evaluate
from peftsurgery.language.expression import Expression, check_calls, check_names, parse
from peftsurgery.language.initial import INITIALISERS, initial
from peftsurgery.language.kinds import KINDS, Kind, sizes_of
from peftsurgery.language.loading import dump_rules, load_rules, parse_rules, shipped
from peftsurgery.language.located import Located
from peftsurgery.language.maths import maths
from peftsurgery.language.operators import OPERATORS, Operator, operator
from peftsurgery.language.pattern import Match, find_pattern
from peftsurgery.language.readings import (
    flat_values,
    fold,
    group_of,
    initial_value,
    initial_values,
    names_in,
    penalty,
    rewrite,
    shape_of,
    weights_read,
)
from peftsurgery.language.reserved import takes_settings
from peftsurgery.language.roles import role
from peftsurgery.language.rule_file import RuleFile, json_schema
from peftsurgery.language.schema import Expect, Param, Pattern, Rule
from peftsurgery.language.selection import Candidate, Selection, select, verdict
from peftsurgery.language.settings import (
    check_settings,
    parse_override,
    parse_overrides,
    resolve_settings,
    settings_of,
    tokens_setting,
)
from peftsurgery.language.site_functions.sites import site_function
from peftsurgery.language.where import Where

__all__ = [
    "INITIALISERS",
    "KINDS",
    "OPERATORS",
    "Candidate",
    "CheckReport",
    "Context",
    "Environment",
    "Expect",
    "Expression",
    "Kind",
    "Located",
    "Match",
    "Operator",
    "Param",
    "Pattern",
    "Rule",
    "RuleFile",
    "Selection",
    "Where",
    "activations",
    "check_calls",
    "check_names",
    "check_rules",
    "check_settings",
    "describe_rules",
    "dump_rules",
    "evaluate",
    "find_pattern",
    "flat_values",
    "fold",
    "group_of",
    "initial",
    "initial_value",
    "initial_values",
    "json_schema",
    "load_rules",
    "mapped",
    "maths",
    "names_in",
    "operator",
    "parse",
    "parse_override",
    "parse_overrides",
    "parse_rules",
    "penalty",
    "resolve_settings",
    "rewrite",
    "role",
    "select",
    "settings_of",
    "shape_of",
    "shipped",
    "site_function",
    "sizes_of",
    "standard",
    "takes_settings",
    "tokens_setting",
    "verdict",
    "weights_read",
]
