"""Operations and cuts: what is done to a model, and where.

An :class:`Operation` is a rule file with its settings under an adapter's name. A :class:`Cut` is
one of its rules at one site of one model. An operated model is a captured one and an ordered list
of operations; everything else about it follows from these.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peftsurgery.anatomy import Placed
from peftsurgery.anatomy.made_weights import made_of
from peftsurgery.anatomy.site import Site
from peftsurgery.capture.copying import SharedByCopies
from peftsurgery.capture.names import join
from peftsurgery.errors import SurgeryError
from peftsurgery.language.kinds import sizes_of
from peftsurgery.language.readings import group_of
from peftsurgery.language.rule_file import RuleFile
from peftsurgery.language.schema import Rule
from peftsurgery.language.where import EVERYWHERE, Where
from peftsurgery.surgery.plan.origin import Origin


@dataclass(frozen=True, eq=False)
class Operation(SharedByCopies):
    """A rule file, its settings (resolved), the name its parameters get, and its origin."""

    file: RuleFile
    settings: Mapping[str, Any]
    name: str
    origin: Origin = field(default_factory=Origin)
    where: Where = EVERYWHERE
    """Clauses that a user added to every rule of the file."""

    @property
    def own_settings(self) -> dict[str, Any]:
        """The settings that the rule file declares, without what it computes from them."""
        return {name: self.settings[name] for name in self.file.with_}


@dataclass(frozen=True, eq=False)
class Cut(SharedByCopies):
    """One rule of an operation at one site.

    ``over`` are the cuts that earlier adapters make there, for each adapter those that it makes, if
    the rule is about their values.
    """

    operation: Operation
    rule: Rule
    placed: Placed
    over: tuple[tuple[Cut, ...], ...] = ()

    @property
    def site(self) -> Site:
        """The site in its program, shared by all blocks of one shape class."""
        return self.placed.site

    @property
    def holder(self) -> str:
        """The path, relative to the block, of the module that holds the cut's parameters.

        Beneath the site's module and the adapter's name. A further part tells the sites of one
        module apart: the slice of a fused weight, a weight that is not called by its module's name
        alone, the sublayer that a residual addition ends.
        """
        path = join(self.site.module, self.operation.name)
        leaf = (self.site.parameter or "").rpartition(".")[2]
        if self.site.slice is not None:
            return join(path, str(self.site.label))
        if leaf and self.rule.train and self.rule.params:
            return join(path, f"of_{leaf}")  # its own copy of the parameter has the name itself
        if leaf not in ("", "weight") and not self.rule.train:
            return join(path, leaf)
        if self.site.kind == "residual":
            return join(path, str(self.placed.facts.get("after", "")))
        return path

    @property
    def parameters(self) -> dict[str, str]:
        """The absolute names of the parameters the cut adds, by the rule's names for them.

        One that all sites share is known by the adapter's name alone, one that a group of them
        shares by the group's number beneath it.
        """
        own, root = join(self.placed.block, self.holder), self.operation.name
        names = {}
        for name, param in self.rule.params.items():
            group = group_of(param, self.rule, self.numbers) if param.shared else False
            holder = own if group is False else root if group is True else join(root, str(group))
            names[name] = join(holder, name)
        return names

    @property
    def weights(self) -> dict[str, str]:
        """The absolute names of the weights the site binds, by the rule's names for them."""
        return {
            name: join(self.placed.block, str(node.target))
            for name, node in self.site.nodes.items()
            if node.op == "get_attr"
        }

    @property
    def made(self) -> dict[str, tuple[str, ...]]:
        """The absolute names of the parameters that a computed weight of the site is made of."""
        found = made_of(self.site)
        return {n: tuple(join(self.placed.block, p) for p in names) for n, names in found.items()}

    @property
    def held(self) -> tuple[str, ...]:
        """The absolute names of the base's tensors that a fold may change."""
        return (*self.weights.values(), *(n for names in self.made.values() for n in names))

    @property
    def done(self) -> tuple[Any, ...]:
        """Hashable identity of the edit; cuts with equal identity yield the same program."""
        inner = tuple(part.done for group in self.over for part in group)
        return (self.operation, id(self.rule), self.site, *inner)

    @property
    def sizes(self) -> dict[str, Any]:
        """The sizes that the site binds."""
        facts = {"layer": self.placed.layer or 0, **self.placed.facts}
        return sizes_of(self.rule.kind, facts)

    @property
    def numbers(self) -> dict[str, Any]:
        """The sizes and settings that the rule's expressions may read."""
        return {**self.operation.settings, **self.sizes}


def notes_of(operations: Iterable[Operation]) -> list[str]:
    """What a reader should know of where operations come from."""
    found = (note for operation in operations for note in operation.origin.notes)
    return list(dict.fromkeys(found))


def in_order(cuts: Iterable[Cut]) -> list[Cut]:
    """Sort cuts into the order in which they are made: inputs of a site before its outputs.

    First parameters, which several sites may read, then weights, then values, then results; of
    each, in the order of the operations. Programs and folds keep to it, so that they agree: what is
    added to a result (y + B A x) is not changed by what becomes of the weight or of x.
    """
    return sorted(cuts, key=_step)


def _step(cut: Cut) -> int:
    kind, names = cut.rule.kind, cut.rule.rewrite.keys()
    if names and kind.result is None:
        return 0
    if not names.isdisjoint(kind.weights):
        return 1
    return 2 if names - {kind.result, kind.computes} else 3


def check_names_free(cuts: Iterable[Cut], taken: Iterable[str]) -> None:
    """Refuse two cuts that would share a parameter without sharing a weight. PSG304."""
    owners: dict[str, Cut] = {}
    occupied = set(taken)
    for cut in cuts:
        for short, name in cut.parameters.items():
            other = owners.get(name)
            common = bool(cut.rule.params[short].shared)
            shared = other is not None and (common or _same_weight(cut, other))
            if name in occupied or (other is not None and not shared):
                hint = "apply under another name: apply(..., name='second')"
                if other is not None and other.operation.file is cut.operation.file:
                    hint = f"two rules of '{cut.operation.file.name}' add it at one site"
                raise SurgeryError("PSG304", f"'{name}' is there already", hint)
            owners[name] = cut


def check_lengthened(cuts: Sequence[Cut], sites: Iterable[Any]) -> None:
    """Refuse more positions of keys for attention that does not get more keys. PSG331."""
    known = [s for s in sites if s.kind == "attention" and s.facts["kind"] == "self"]
    for cut in cuts:
        if not cut.rule.kind.lengthens or cut.placed.facts["kind"] != "key":
            continue
        mine = {(c.placed.block, c.site) for c in cuts if c.operation is cut.operation}
        for core in known:
            alike = bool(core.facts["causal"]) == cut.placed.facts["causal"]
            if alike and (core.block, core.site) not in mine:
                raise SurgeryError(
                    "PSG331",
                    f"{cut.operation.name} gives more positions to the keys of '{core.module}', "
                    "and no more keys",
                    "leave the positions as they are: shift=false, or prefix all layers",
                )


def _same_weight(cut: Cut, other: Cut) -> bool:
    """Whether two cuts are one weight used twice (a layer that is called several times)."""
    return cut.rule is other.rule and cut.placed.parameter == other.placed.parameter is not None


def adapter_name(name: str) -> str:
    """Check an adapter's name, which becomes part of parameter names. Raises PSG304."""
    if not is_adapter_name(name):
        raise SurgeryError("PSG304", f"'{name}' cannot be the name of an adapter")
    return name


def is_adapter_name(name: Any) -> bool:
    """Whether something can be an adapter's name."""
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", name) is not None


def copy_name(parameter: str, adapter: str) -> str:
    """The name of an adapter's copy of a parameter, unless it has the parameter's own."""
    owner, _, leaf = parameter.rpartition(".")
    return join(join(owner, adapter), leaf)
