"""compare_algebra: whether two rules compute the same, tried on random tensors.

Both rules are read over the same site of each kind and size, with the same values and the same
parameters: those of one name, then those of one shape in order. What has no partner is drawn by
itself. Dropout is off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftsurgery.errors import SurgeryError
from peftsurgery.language.checking import TOLERANCE, random_outputs, site_result
from peftsurgery.language.consistency import OUTPUTS
from peftsurgery.language.evaluation import Context
from peftsurgery.language.readings import fold, penalty, rewrite, shapes_of
from peftsurgery.language.schema import Rule
from peftsurgery.language.specimens import Specimen, variants

Env = Mapping[str, Any]
DIFFERS = "differs by up to"
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class RuleWithSettings:
    """A rule, and what its settings and the numbers computed from them are."""

    rule: Rule
    settings: Env


class IncomparableError(Exception):
    """Why it cannot be said whether two rules compute the same."""


def compare_algebra(a: RuleWithSettings, b: RuleWithSettings) -> Iterator[tuple[str, str]]:
    """(reading, verdict) for each of rewrite, fold and penalty that both rules have.

    A verdict is "the same ...", "differs by up to ... at ..." or "cannot be said: ...".
    """
    for name, reading in _READINGS.items():
        if getattr(a.rule, name) and getattr(b.rule, name):
            yield name, _verdict(a, b, reading)


def _verdict(a: RuleWithSettings, b: RuleWithSettings, reading: Reading) -> str:
    try:
        largest, place = max(_distances(a, b, reading), key=lambda found: found[0])
    except IncomparableError as reason:
        return f"cannot be said: {reason}"
    if largest <= TOLERANCE:
        return f"the same on random tensors, to {TOLERANCE:.0e}"
    return f"{DIFFERS} {largest:.2g} of the largest value, at {place}"


def _distances(
    a: RuleWithSettings, b: RuleWithSettings, reading: Reading
) -> Iterator[tuple[float, str]]:
    """The relative distance at each variant of the site, at the first sizes that both are for."""
    if a.rule.applies(a.settings) != b.rule.applies(b.settings):
        raise IncomparableError("one of the rules is left out")
    generator = torch.Generator().manual_seed(0)
    reasons, found = ["only a model has such sites"], False
    for variant in variants(a.rule.kind.name):
        for specimen in variant.specimens(generator):
            try:
                distance = _distance(a, b, reading, specimen, generator)
            except SurgeryError as error:
                reasons.append(error.message)
                continue
            yield distance, specimen.title
            found = True
            break
    if not found:
        raise IncomparableError(reasons[-1])


def _distance(
    a: RuleWithSettings,
    b: RuleWithSettings,
    reading: Reading,
    specimen: Specimen,
    generator: torch.Generator,
) -> float:
    first, second = _drawn(_shapes(a, specimen), _shapes(b, specimen), generator)
    envs = _bound(a, specimen, first), _bound(b, specimen, second)
    made = [reading(each.rule, specimen, env) for each, env in zip((a, b), envs, strict=True)]
    # what one of them leaves alone stays as it was
    names = dict.fromkeys(name for values in made for name in values)
    one, other = (
        {name: values.get(name, env.get(name, 0.0)) for name in names}
        for values, env in zip(made, envs, strict=True)
    )
    return max(_apart(one[name], other[name], specimen) for name in names)


def _shapes(each: RuleWithSettings, specimen: Specimen) -> Shapes:
    env = specimen.environment(each.settings)
    return shapes_of(each.rule, env)


def _bound(each: RuleWithSettings, specimen: Specimen, params: Mapping[str, Tensor]) -> Env:
    env = specimen.environment(each.settings, params)
    if each.rule.over:
        result = env[str(each.rule.kind.result)]
        env[OUTPUTS] = random_outputs(result, torch.Generator().manual_seed(1))
    return env


def _drawn(
    a: Shapes, b: Shapes, generator: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random parameters of both rules, the same for those that are each other."""
    partners = {name: name for name in a if name in b}
    for name in partners:
        if a[name] != b[name]:
            raise IncomparableError(f"{name} is {list(a[name])} and {list(b[name])}")
    free = [name for name in b if name not in a]
    for name in a:
        other = next((each for each in free if each not in partners and b[each] == a[name]), None)
        if name not in b and other is not None:
            partners[other] = name
    made = {name: _random(shape, generator) for name, shape in a.items()}
    others = {
        name: made[partners[name]] if name in partners else _random(shape, generator)
        for name, shape in b.items()
    }
    return made, others


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _apart(one: Any, other: Any, specimen: Specimen) -> float:
    """The largest difference of two values, relative to the largest number in them."""
    x, y = (torch.as_tensor(each, dtype=torch.float64) for each in (one, other))
    if x.shape != y.shape:
        shapes = f"{list(x.shape)} and {list(y.shape)}"
        raise IncomparableError(f"the results have the shapes {shapes}, at {specimen.title}")
    if not (x.isfinite().all() and y.isfinite().all()):
        raise IncomparableError(f"a result is not finite, at {specimen.title}")
    size = max(float(each.abs().max()) if each.numel() else 0.0 for each in (x, y))
    return float((x - y).abs().max()) / size if size else 0.0


def _rewritten(rule: Rule, specimen: Specimen, env: Env) -> dict[str, Any]:
    context = Context(functions=specimen.functions)
    values = rewrite(rule, env, context)
    if specimen.operation is None:
        return values
    return {"the site": site_result(rule, specimen.operation, env, values, context)}


def _folded(rule: Rule, specimen: Specimen, env: Env) -> dict[str, Any]:
    return fold(rule, env)


def _penalised(rule: Rule, specimen: Specimen, env: Env) -> dict[str, Any]:
    return penalty(rule, env)


Reading = Callable[[Rule, Specimen, Env], dict[str, Any]]
_READINGS: Mapping[str, Reading] = {
    "rewrite": _rewritten,
    "fold": _folded,
    "penalty": _penalised,
}
