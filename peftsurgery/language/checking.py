"""Checking rules without a model.

For every rule, sites of several kinds and sizes are made of random numbers; where the rule does not
fit the sizes, larger ones are tried, which more numbers divide. The rule's parameters are drawn
at random too, so that nothing is hidden by a zero. Then three things must hold: the rewrite has the
shape of what it replaces, the same text reads as graph operations, and the operation with the
folded weights equals the rewritten operation to 1e-9 in double precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from peftsurgery.arguments import checked
from peftsurgery.errors import SurgeryError
from peftsurgery.language.consistency import OUTPUTS
from peftsurgery.language.environment import mapped
from peftsurgery.language.evaluation import Context
from peftsurgery.language.kinds import KINDS
from peftsurgery.language.loading import load_rules
from peftsurgery.language.readings import fold, initial_values, penalty, rewrite, shapes_of
from peftsurgery.language.rule_file import RuleFile
from peftsurgery.language.schema import Rule
from peftsurgery.language.settings import resolve_settings
from peftsurgery.language.specimens import Operation, Specimen, check_sizes_wanted, variants

TOLERANCE = 1e-9


# What a rule is refused with at sizes that it is not for.
UNFIT = ("PSG116", "PSG122", "PSG123", "PSG131")


@dataclass(frozen=True)
class Check:
    """One rule on one specimen: what was proved, and the largest relative difference of a fold.

    ``unfit`` are the sizes at which the rule does not fit, tried before, each with the reason.
    """

    rule: int
    specimen: str
    shapes: bool
    folded: float | None
    unfit: tuple[str, ...] = ()


@dataclass(frozen=True)
class CheckReport:
    """Everything that was proved about a rule file.

    ``trained`` are the rules that compute nothing, and ``unchecked`` those that only a model can
    check, by number.
    """

    name: str
    checks: tuple[Check, ...]
    trained: tuple[int, ...]
    unchecked: tuple[int, ...]
    words: tuple[str, ...] = ()

    def __str__(self) -> str:
        passed = f"{len(self.checks)} check{'s' if len(self.checks) != 1 else ''} passed"
        lines = [f"{self.name}: {passed if self.checks else 'nothing to compute'}"]
        for check in self.checks:
            shown = "" if check.folded is None else f", fold agrees to {check.folded:.0e}"
            lines.append(f"  rule {check.rule}, {check.specimen}: shapes fit{shown}")
            lines += [f"    it does not fit {each}" for each in check.unfit]
        lines += [f"  {text}" for text in self.words]
        lines += [f"  rule {number}: only a model can check it" for number in self.unchecked]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The report as ``--json`` prints it."""
        return {name: value for name, value in asdict(self).items() if name != "words"}


@checked
def check_rules(
    rules: RuleFile | str | Path,
    overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
) -> CheckReport:
    """Check a rule file on random tensors, without a model: shapes, traces and folds.

    ``overrides`` are settings, ``sizes`` those of the sites that the rules are tried on, by the
    names that rules give them ({"in": 64}); what is not said is tried out, since a rule may be for
    sizes that a number divides. Raises PSG131 for a shape, PSG133 for a penalty that is no number,
    PSG132 for text that does not trace, PSG130 for a fold that differs, PSG134 for a size that no
    site has, and whatever evaluation raises (PSG115, PSG116, PSG122, PSG123).
    """
    file = rules if isinstance(rules, RuleFile) else load_rules(rules)
    check_sizes_wanted(sizes or {})
    settings = resolve_settings(file, overrides)
    generator = torch.Generator().manual_seed(seed)
    checks, unchecked, trained, words = [], [], [], []
    for number, rule in enumerate(file.rules, 1):
        if not rule.applies(settings):
            words.append(f"rule {number}: left out with these settings")
        elif not rule.rewrite:
            trained.append(number)
            words.append(f"rule {number}: {_done(rule)}, nothing to compute")
        elif rule.kind.name in KINDS:
            checks += _check_variants(number, rule, settings, sizes or {}, generator)
        else:
            unchecked.append(number)
    return CheckReport(file.name, tuple(checks), tuple(trained), tuple(unchecked), tuple(words))


def _done(rule: Rule) -> str:
    """What a rule without a rewrite does to its sites, in words."""
    weights = " and ".join(rule.kind.weights) or "what they have"
    kept = " and ".join(rule.store)
    parts = [f"trains {weights} of its {rule.kind.name} sites"] if rule.train else []
    parts += [f"keeps {kept} of its {rule.kind.name} sites in another form"] if kept else []
    return ", ".join(parts)


def _check_variants(
    number: int,
    rule: Rule,
    settings: Mapping[str, Any],
    sizes: Mapping[str, int],
    generator: torch.Generator,
) -> list[Check]:
    """Every variant of a rule's kind at the first sizes that the rule is for.

    A rule must be for all variants; of parameters, which may have any number of dimensions, for
    some. Raises what the first sizes raised where none fit.
    """
    checks: list[Check] = []
    refused: list[SurgeryError] = []
    for variant in variants(rule.kind.name, sizes):
        unfit: list[str] = []
        errors: list[SurgeryError] = []
        for specimen in variant.specimens(generator):
            try:
                found = _check(number, rule, settings, specimen, generator)
            except SurgeryError as error:
                if error.code not in UNFIT:
                    raise
                errors.append(error)
                unfit.append(f"{specimen.title}: {error.message}")
            else:
                checks.append(replace(found, unfit=tuple(unfit)))
                break
        else:
            if rule.kind.result is not None:
                raise errors[0]
            refused += errors[:1]
    if refused and not checks:
        raise refused[0]
    return checks


def _check(
    number: int,
    rule: Rule,
    settings: Mapping[str, Any],
    specimen: Specimen,
    generator: torch.Generator,
) -> Check:
    title = f"rule {number} ({rule.kind.name}) at {specimen.title}"
    env = specimen.environment(settings)
    initial_values(rule, env, {}, generator=generator)
    for name, shape in shapes_of(rule, env).items():
        env[name] = torch.randn(shape, generator=generator, dtype=torch.float64)
    if rule.over:
        env[OUTPUTS] = random_outputs(env[str(rule.kind.result)], generator)
    penalty(rule, env)
    context = Context(functions=specimen.functions)
    values = rewrite(rule, env, context)
    _check_shapes(title, rule, env, values)
    _check_traces(title, rule, env)
    _check_shapes(title, rule, env, _fake(rule, env, context))
    operation = specimen.operation if rule.fold else None
    folded = None
    if operation is not None:
        folded = _difference(title, rule, operation, env, values, context)
    return Check(number, specimen.title, True, folded)


def random_outputs(result: Tensor, generator: torch.Generator) -> Tensor:
    """Random stand-ins for what three adapters make of a result: (..., adapters, features)."""
    shape = (*result.shape[:-1], 3, result.shape[-1])
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _check_shapes(
    title: str, rule: Rule, env: Mapping[str, Any], values: Mapping[str, Any]
) -> None:
    for name, value in values.items():
        old, new = getattr(env[name], "shape", None), getattr(value, "shape", None)
        free = rule.kind.lengthens or (rule.kind.is_inputs and _alike(old, new))
        if old != new and not free:
            message = f"{title}: {name} has shape {_sizes(old)}, the rewrite {_sizes(new)}"
            raise SurgeryError("PSG131", message, where=rule.rewrite[name].where())


def _alike(old: Any, new: Any) -> bool:
    """Whether a value of one shape can take the place of another but for batch and tokens."""
    fits = old is not None and new is not None and len(old) == len(new)
    return bool(fits and old[2:] == new[2:])


def _check_traces(title: str, rule: Rule, env: Mapping[str, Any]) -> None:
    """Read the rewrite over proxies, as surgery will."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    proxies = {
        name: fx.Proxy(graph.placeholder(name), tracer) if isinstance(value, Tensor) else value
        for name, value in env.items()
    }
    training = fx.Proxy(graph.placeholder("training"), tracer)
    try:
        rewrite(rule, proxies, Context(training=training))
    except (fx.proxy.TraceError, TypeError, SurgeryError) as error:
        reason = error.message if isinstance(error, SurgeryError) else str(error)
        raise SurgeryError("PSG132", f"{title}: {reason}") from error


def _fake(rule: Rule, env: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Read the rewrite over fake tensors: shapes alone."""
    with FakeTensorMode() as mode:
        fakes = mapped(env, lambda v: mode.from_tensor(v) if isinstance(v, Tensor) else v)
        return rewrite(rule, fakes, context)


def _difference(
    title: str,
    rule: Rule,
    operation: Operation,
    env: Mapping[str, Any],
    rewritten: Mapping[str, Any],
    context: Context,
) -> float:
    """Largest difference of folded and rewritten operation, relative to the largest value."""
    folded = fold(rule, env)
    for name, weight in folded.items():
        was = getattr(env[name], "shape", None)
        if isinstance(was, torch.Size) and was != weight.shape:
            message = f"{title}: {name} has shape {_sizes(was)}, the fold {_sizes(weight.shape)}"
            raise SurgeryError("PSG131", message, where=rule.fold[name].where())
    expected = site_result(rule, operation, env, rewritten, context)
    actual = operation({**env, **folded})
    difference = float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-300))
    if not difference <= TOLERANCE:
        text = ", ".join(f"{name} = {e.text}" for name, e in rule.fold.items())
        message = f"{title}: the fold {text} differs from the rewrite by {difference:.1e}"
        where = next(iter(rule.fold.values())).where()
        raise SurgeryError("PSG130", message, f"tolerance {TOLERANCE:.0e}, relative", where)
    return difference


def site_result(
    rule: Rule,
    operation: Operation,
    env: Mapping[str, Any],
    rewritten: Mapping[str, Any],
    context: Context,
) -> Tensor:
    """What a site computes once some of its bindings are rewritten: inputs first, then the result.

    ``env`` binds the site's values and the rule's parameters; ``rewritten`` is what
    :func:`rewrite` makes of them in this ``context``.
    """
    result = rule.kind.result or "y"
    changed = {name: value for name, value in rewritten.items() if name != result}
    # what goes in may be another, and so may be what the result is made of
    found = operation({**env, **changed})
    if result not in rewritten:
        return found
    made: Tensor = rewrite(rule, {**env, **changed, result: found}, context)[result]
    return made


def _sizes(shape: Any) -> str:
    return "none" if shape is None else str(list(shape))
