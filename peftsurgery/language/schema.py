"""The schema of rule files: what a method is, as data.

The models are pydantic's, so ``peftsurgery rules schema`` prints a JSON schema for editors. Every
attribute's docstring is its description there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    WithJsonSchema,
    model_validator,
)

from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.language.evaluation import evaluate
from peftsurgery.language.expression import Expression, parse
from peftsurgery.language.file_formats import MODULES, TABLE, key_suffixes, reserved_entry
from peftsurgery.language.kinds import KINDS, Kind, pattern_kind
from peftsurgery.language.position import Text, position_of
from peftsurgery.language.strict import Strict, Word
from peftsurgery.language.where import Names, Where, substitute
from peftsurgery.reach import reach


def _as_expression(value: Any) -> Expression:
    if isinstance(value, Expression):
        return value
    return parse(value, position_of(value))


ExpressionField = Annotated[
    Expression,
    PlainValidator(_as_expression),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": ["string", "number"], "description": "An expression."}),
]
Scalar = StrictBool | StrictInt | StrictFloat | StrictStr | None
Setting = Scalar | list[Scalar]


class Pattern(Strict):
    """A sub-graph to match: an expression of operators with free names."""

    noun: ClassVar[str] = "match"
    pattern: ExpressionField


class Expect(Strict):
    """How many sites a rule must match. A plain number means ``exactly``."""

    noun: ClassVar[str] = "expect"
    at_least: int | None = Field(default=None, ge=0, strict=True)
    """The fewest sites there may be; 0 for a rule that may match nothing."""
    at_most: int | None = Field(default=None, ge=0, strict=True)
    """The most sites there may be."""
    exactly: int | None = Field(default=None, ge=0, strict=True)
    """The number of sites; what a plain number means."""
    per_attention: int | None = Field(default=None, ge=0, strict=True)
    """The number of roles at every attention core that the clauses besides `role` leave. A role
    that a core has no projection for (its keys are another layer's, its query is a parameter)
    counts, and is reported."""
    per_block: int | None = Field(default=None, ge=0, strict=True)
    """The number of sites in every block where the clauses besides `role` leave one."""
    complete: StrictBool = False
    """Whether every attention core must have its own projection for each role that is counted."""


class Param(Strict):
    """A parameter that a rule adds at each of its sites."""

    noun: ClassVar[str] = "parameter"
    shape: tuple[ExpressionField, ...]
    """One expression for each dimension, over sizes and settings."""
    init: ExpressionField = Field(default_factory=lambda: parse("zeros"), validate_default=True)
    """An initialiser (zeros, normal(0.02), kaiming_uniform(sqrt(5))) or any expression.

    It may read the weights, and the parameters that stand before it as they are initially."""
    dtype: Literal["float32", "float16", "bfloat16", "float64"] = "float32"
    """The dtype in which it is kept and trained."""
    train: StrictBool = True
    """Whether it is trained; if not, it keeps its initial value, which is saved with the rest."""
    shared: StrictBool | ExpressionField = False
    """Whether it is one parameter for all sites, trained and saved once. An expression over sizes
    and settings gives each site the number of its group; sites of a group share it."""


def _number(text: str) -> Any:
    return Field(default_factory=lambda: parse(text), validate_default=True)


class Ranks(Strict):
    """What a rank allocator may take away: parts of a cut that are counted along one dimension.

    Every number is an expression over the settings.
    """

    noun: ClassVar[str] = "ranks"
    axes: dict[Word, StrictInt] = Field(min_length=1)
    """For each parameter that has ranks, the dimension that counts them."""
    zero: Word
    """The parameter in which the ranks that lose are set to zero."""
    target: ExpressionField
    """How many ranks a site keeps in the end, on average over the sites."""
    total: ExpressionField
    """How many steps the training has; 0 if only the training knows."""
    initial: ExpressionField = _number("0")
    """Steps at the start in which nothing is taken away."""
    final: ExpressionField = _number("0")
    """Steps at the end in which the choice stays as it is."""
    interval: ExpressionField = _number("1")
    """Steps from one choice to the next."""
    beta1: ExpressionField = _number("0.85")
    """How much of the old sensitivity is kept in each step."""
    beta2: ExpressionField = _number("0.85")
    """How much of the old uncertainty is kept in each step."""


def _as_match(value: Any) -> Any:
    if isinstance(value, str) and value not in KINDS:
        message = f"unknown kind of site '{value}'"
        raise SurgeryError("PSG106", message, did_you_mean(value, KINDS), position_of(value))
    return value


def _as_expect(value: Any) -> Any:
    return {"exactly": value} if isinstance(value, int) and not isinstance(value, bool) else value


class Rule(Strict):
    """One rule of a method: sites to match, parameters to add, new values, folded weights.

    Made from YAML by :func:`load_rules`, or in Python: ``Rule(match="linear", rewrite="2 * y")``.
    """

    noun: ClassVar[str] = "rule"
    match: Annotated[Word | Pattern, BeforeValidator(_as_match)]
    """The kind of site, or {pattern: expression}."""
    where: Where = Where()
    """Clauses that choose among the sites of that kind."""
    when: ExpressionField | None = None
    """A condition on the settings: where it does not hold, the rule is left out."""
    expect: Annotated[Expect, BeforeValidator(_as_expect)] = Expect(at_least=1)
    """How many sites must match; at least one unless told otherwise."""
    over: Names = ()
    """Earlier adapters by name: `outputs` binds what each of them makes of the match's result,
    stacked before the last dimension. The rule is about the sites that all of them cut at; there
    they do nothing else, and they are not trained."""
    let: dict[Word, ExpressionField] = Field(default_factory=dict)
    """Names for intermediate values, each computed at most once where it is used."""
    params: dict[Word, Param] = Field(default_factory=dict)
    """What the rule adds at each site."""
    rewrite: dict[Word, ExpressionField] = Field(default_factory=dict)
    """The new value of the match's result, or of several bindings by name."""
    fold: dict[Word, ExpressionField] = Field(default_factory=dict)
    """The new value of the weight W, or of several weights by name."""
    store: dict[Word, ExpressionField] = Field(default_factory=dict)
    """How the model keeps the weight W, or several weights by name: nf4(block, double, compute)."""
    train: StrictBool = False
    """Train the parameters that the model has at the matched sites."""
    penalty: dict[Literal["sum", "mean"], ExpressionField] = Field(default_factory=dict)
    """A number for each site, over parameters, weights and settings, that is added to the loss
    while training: the sum over the adapter's sites, unless it is said to be the mean."""
    ranks: Ranks | None = None
    """What a rank allocator may take away while training, and when."""
    checkpoint: dict[Word, dict[Word, Word]] = Field(default_factory=dict)
    """For each file format, the key suffix of each parameter, after a / the key of a tensor of the
    whole model, or under `table` the name of a table of the format's own; and under `modules`, the
    config key that lists the modules of this rule, if the format has one."""

    @model_validator(mode="before")
    @classmethod
    def _name_results(cls, data: Any) -> Any:
        """A text alone is, for ``rewrite``, the result; for ``fold``, W; for ``penalty``, a sum."""
        if not isinstance(data, Mapping):
            return data
        data = dict(data)
        kind = KINDS.get(data["match"]) if isinstance(data.get("match"), str) else None
        result = (kind.result if kind else "y") or "W"
        for key, target in (("rewrite", result), ("fold", "W"), ("store", "W"), ("penalty", "sum")):
            value = data.get(key)
            if key in data and not isinstance(value, Mapping):
                named = Text(target, value.position) if isinstance(value, Text) else target
                data[key] = {named: value}
        return data

    def applies(self, settings: Mapping[str, Any]) -> bool:
        """Whether the rule's ``when`` holds with these settings."""
        return self.when is None or bool(evaluate(self.when, settings))

    def reads(self) -> frozenset[str]:
        """The names that the new values depend on, through `let` names too."""
        start = [name for expression in self.rewrite.values() for name in expression.names]
        let = self.let
        return frozenset(reach(start, lambda name: let[name].names if name in let else ()))

    @property
    def kind(self) -> Kind:
        """The names that the match binds."""
        if isinstance(self.match, Pattern):
            return pattern_kind(tuple(self.match.pattern.names))
        return KINDS[self.match]

    def suffixes(self, format_name: str) -> dict[str, str]:
        """The key suffix of each parameter in a file format; none if the format has no form."""
        return key_suffixes(self.checkpoint.get(format_name, {}), self.params)

    def listing(self, format_name: str) -> str | None:
        """The config key of a file format that lists the modules of this rule."""
        return self._reserved(format_name, MODULES)

    def table(self, format_name: str) -> str | None:
        """The name of the table of a file format that says what the parameters are called."""
        return self._reserved(format_name, TABLE)

    def _reserved(self, format_name: str, word: str) -> str | None:
        return reserved_entry(self.checkpoint.get(format_name, {}), self.params, word)

    def fused(self, settings: Mapping[str, Any]) -> tuple[str, ...]:
        """The names of the adapters that the rule is over."""
        return tuple(str(name) for name in substitute(self.over, settings) or ())

    @property
    def pattern(self) -> Expression | None:
        """The expression to look for, if the match is a pattern."""
        return self.match.pattern if isinstance(self.match, Pattern) else None


class Flat(Strict):
    """What a method is once it is trained, if a network makes its parameters until then."""

    noun: ClassVar[str] = "flat"
    rule: Word
    """The rules of the trained method, applied at the same sites with the same settings."""
    settings: dict[Word, ExpressionField] = Field(default_factory=dict)
    """Those of their settings that are not this method's of the same name."""
    params: dict[Word, ExpressionField] = Field(min_length=1)
    """Their parameters, in terms of this method's."""
