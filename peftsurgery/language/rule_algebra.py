"""Algebra of a rule's change, probed on specimens: linearity, factors, ratios.

A rule's change is what its rewrite makes of a value, less that value. Tried on random numbers in
double precision, it tells without reading the rule which parameters it is proportional to: that of
LoRA, scale * B A x, is to A and to B, that of a bottleneck to U and its bias together, that of IA3,
y * (s - 1), to none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from peftsurgery.errors import SurgeryError
from peftsurgery.language.parameter_axes import axes_of
from peftsurgery.language.readings import fold, initial_values, rewrite, shapes_of, weights_read
from peftsurgery.language.schema import Rule
from peftsurgery.language.specimens import Specimen, variants

TOLERANCE = 1e-8
MOST_PARAMETERS = 6

Params = Mapping[str, Tensor]
Settings = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Effect:
    """The change that a rule makes of one specimen."""

    rule: Rule
    specimen: Specimen

    def of(self, settings: Settings, params: Params) -> Tensor:
        """Change of the rewritten values, flattened into one vector."""
        old = self.specimen.bindings
        new = rewrite(self.rule, self.specimen.environment(settings, params))
        return torch.cat([(new[name] - old[name]).flatten() for name in sorted(new)])

    def weight(self, settings: Settings, params: Params, W: Tensor) -> Tensor:
        """What the folded weight differs from ``W`` by."""
        bound = self.specimen.environment(settings, {**params, "W": W})
        difference: Tensor = fold(self.rule, bound)["W"] - W
        return difference

    def shapes(self, settings: Settings) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters at this specimen."""
        return shapes_of(self.rule, self.specimen.environment(settings))

    def random(self, settings: Settings, seed: int = 0) -> dict[str, Tensor]:
        """Random parameters."""
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.randn(shape, generator=generator, dtype=torch.float64)
            for name, shape in self.shapes(settings).items()
        }

    def factors(self, settings: Settings) -> list[frozenset[str]]:
        """The smallest sets of parameters that the change is proportional to, none overlapping.

        They are the factors of a product, or the last layer of a network.
        """
        params = self.random(settings)
        plain, found = self.of(settings, params), list[frozenset[str]]()
        names = list(params) if len(params) <= MOST_PARAMETERS else []
        for size in range(1, len(names) + 1):
            for some in combinations(names, size):
                if any(known & set(some) for known in found):
                    continue
                larger = {n: 3 * v if n in some else v for n, v in params.items()}
                if plain.any() and near(self.of(settings, larger), 3 * plain):
                    found.append(frozenset(some))
        return found

    def is_affine(self, settings: Settings) -> bool:
        """Whether the change is linear in all parameters together, but for a constant.

        And nothing where they start, as said without the weight.
        """
        if any(weights_read(param, self.rule, settings) for param in self.rule.params.values()):
            return False
        one, two, three = (self.random(settings, seed) for seed in range(3))
        mixed = {name: 2 * one[name] - 3 * two[name] + 2 * three[name] for name in one}
        parts = [self.of(settings, params) for params in (one, two, three)]
        whole = 2 * parts[0] - 3 * parts[1] + 2 * parts[2]
        start = initial_values(self.rule, self.specimen.environment(settings), {})
        doubles = {name: value.double() for name, value in start.items()}
        return near(self.of(settings, mixed), whole) and not self.of(settings, doubles).any()

    def ratio(self, one: Settings, other: Settings, sized: Collection[str]) -> float | None:
        """Ratio of the changes under two choices of settings.

        None if it is not a multiple. Along axes that grow with the settings in ``sized`` only the
        first entry is not zero, so that choices of different size can be compared.
        """
        changes = []
        for settings in (one, other):
            params = {name: torch.zeros_like(v) for name, v in self.random(settings).items()}
            generator = torch.Generator().manual_seed(0)
            for name, value in params.items():
                axes = axes_of(self.rule, name, sized)
                first = tuple(slice(0, 1) if d in axes else slice(None) for d in range(value.ndim))
                shape = value[first].shape
                value[first] = torch.randn(shape, generator=generator, dtype=torch.float64)
            changes.append(self.of(settings, params))
        scale = float(changes[0] @ changes[1] / (changes[1] @ changes[1]).clamp(min=1e-300))
        return scale if near(changes[0], scale * changes[1]) else None


def effects(rule: Rule, numbers: Mapping[str, Any]) -> Iterator[Effect]:
    """The rule on the specimens on which it can be tried; ``numbers`` are a real site's sizes."""
    generator = torch.Generator().manual_seed(0)
    for variant in variants(rule.kind.name):
        for specimen in variant.specimens(generator):
            # the groups of a convolution divide its sizes: a specimen with others tells nothing
            if specimen.bindings.get("groups") != numbers.get("groups"):
                continue
            effect = Effect(rule, specimen)
            try:
                effect.of(numbers, effect.random(numbers))
            except SurgeryError:
                continue
            yield effect
            break


def near(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same but for rounding."""
    scale = float(other.abs().max()) if other.numel() else 0.0
    return bool((one - other).abs().max() <= TOLERANCE * max(scale, 1e-300))
