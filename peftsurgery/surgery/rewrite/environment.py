"""Environment of a cut: values of its rule's names, in the domain of one reading.

A rule is read (:mod:`peftsurgery.language.readings`) over proxies, which inserts nodes, over fake
tensors, which tells shapes, and over tensors: to fold, to add a penalty, to start training. These
domains differ in where they find what a name stands for; how a rule sees it is the same in all.
Sizes and settings are numbers. Weights are (out, in), weights and results the slice alone, values
in the layout of :mod:`.layout`, and all of them in the dtype that the cut computes in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from peftsurgery.anatomy.site import features_dim
from peftsurgery.capture.names import join
from peftsurgery.language.consistency import OUTPUTS
from peftsurgery.language.environment import Environment
from peftsurgery.language.evaluation import Context
from peftsurgery.language.readings import rewrite, shape_of
from peftsurgery.surgery.plan.cut import Cut
from peftsurgery.surgery.rewrite.computed_weights import computed
from peftsurgery.surgery.rewrite.dtypes import cast, compute_dtype, dtype_of
from peftsurgery.surgery.rewrite.layout import as_seen, orient
from peftsurgery.surgery.rewrite.site_functions import Replay


class Domain(ABC):
    """Domain of a reading: where weights and parameters of a cut come from."""

    @abstractmethod
    def bound(self, cut: Cut, name: str) -> Any:
        """A weight that the cut's site binds; where values can be read, or a value."""

    @abstractmethod
    def parameter(self, cut: Cut, name: str) -> Any:
        """A parameter that the cut adds."""

    def cast(self, cut: Cut, name: str, value: Any) -> Any:
        """A value or a weight in the dtype that the cut computes in."""
        return cast(value, dtype_of(cut.site.nodes[name]), compute_dtype(cut))

    def context(self, cut: Cut) -> Context:
        """Context for evaluating the cut's expressions in this domain."""
        return Context()


class ValueDomain(Domain):
    """Domain in which what flows through a site can be read too, and run through it again."""

    @abstractmethod
    def replay(self, cut: Cut) -> Replay:
        """Site functions in this domain."""

    def context(self, cut: Cut) -> Context:
        """Context for evaluating the cut's expressions: with its site's functions."""
        return Context(functions=self.replay(cut).functions)


def environment(cut: Cut, domain: Domain) -> Environment:
    """Bind the names of a cut's rule; each is looked up in the domain when first read."""
    site, kind = cut.site, cut.rule.kind

    def weight(name: str) -> Any:
        if name not in site.nodes:
            return 0.0
        return domain.cast(cut, name, orient(domain.bound(cut, name), site, name))

    def outputs(name: str) -> Any:
        return torch.stack([output(group, domain, compute_dtype(cut)) for group in cut.over], -2)

    made: dict[str, Callable[[str], Any]]
    if isinstance(domain, ValueDomain):
        made = _values(cut, domain)
    else:  # what a pattern binds may be a weight too
        made = dict.fromkeys(cut.weights, weight)
    made |= dict.fromkeys(kind.weights, weight)
    made |= dict.fromkeys(cut.rule.params, lambda name: domain.parameter(cut, name))
    if cut.over:
        made[OUTPUTS] = outputs
    return Environment(cut.numbers, made)


def _values(cut: Cut, domain: ValueDomain) -> dict[str, Callable[[str], Any]]:
    """What flows through a cut's site, by the names that are bound there."""
    site, kind = cut.site, cut.rule.kind

    def value(name: str) -> Any:
        if name not in site.nodes:
            return None if kind.is_inputs else domain.replay(cut).mask()
        found = domain.bound(cut, name)
        if site.taken is not None and name == kind.result:
            found = site.taken.take(found, features_dim(site))
        return domain.cast(cut, name, as_seen(site, name, found))

    bound = {*kind.values} if kind.is_inputs else {*site.nodes, *kind.optional}
    return dict.fromkeys((name for name in kind.values if name in bound), value)


def output(cuts: Iterable[Cut], domain: Domain, dtype: torch.dtype) -> Any:
    """Value that one adapter's cuts make of their site's result, in ``dtype``."""
    value = None
    for cut in cuts:
        mine, result = compute_dtype(cut), str(cut.rule.kind.result)
        env = environment(cut, domain)
        if value is not None:
            env.bind(result, cast(value, dtype, mine))
        value = cast(rewrite(cut.rule, env, domain.context(cut))[result], mine, dtype)
    return value


class TensorDomain(Domain):
    """Domain of real tensors, read by their names in the model.

    ``given`` are weights to take instead, by the rule's names for them.
    """

    def __init__(
        self,
        read: Callable[[str], torch.Tensor],
        given: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        self.read, self.given = read, given

    def bound(self, cut: Cut, name: str) -> torch.Tensor:
        """A weight as it is read, or as it is computed of what is read."""
        if name in self.given:
            return self.given[name]
        block = cut.placed.block
        return computed(cut.site.nodes[name], lambda node: self.read(join(block, str(node.target))))

    def parameter(self, cut: Cut, name: str) -> torch.Tensor:
        """A parameter as it is read."""
        return self.read(cut.parameters[name])

    def cast(self, cut: Cut, name: str, value: Any) -> Any:
        """Return the tensor: ``read`` casts already."""
        return value


class FakeDomain(ValueDomain):
    """Domain of fake tensors: those of the capture, or ``known`` ones."""

    def __init__(self, known: Mapping[str, Any] = MappingProxyType({})) -> None:
        self.known = known

    def bound(self, cut: Cut, name: str) -> Any:
        """A value or a weight."""
        return self.known.get(name, cut.site.nodes[name].meta["val"])

    def parameter(self, cut: Cut, name: str) -> torch.Tensor:
        """An empty tensor of the parameter's shape."""
        values = (node.meta["val"] for node in cut.site.nodes.values())
        device = next(value.device for value in values if isinstance(value, torch.Tensor))
        shape = shape_of(cut.rule.params[name], cut.rule, cut.numbers)
        return torch.empty(shape, dtype=compute_dtype(cut), device=device)

    def replay(self, cut: Cut) -> Replay:
        """The site's functions on fake tensors."""
        return Replay(cut.placed, _fake, compute_dtype(cut))


def _fake(node: Any) -> Any:
    """The fake value of a node; a flag of the mode, or a rate that depends on it, is off."""
    value = node.meta.get("val")
    return 0 if value is None else value
