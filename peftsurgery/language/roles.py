"""Roles: the names of a site's part in a model, found by dataflow or defined by users.

The anatomy gives a site at most one role. A user's role is a predicate on placed sites, written in
Python with :func:`role` or as ``where`` clauses under ``roles:`` in a rule file, and a site may
have any number of those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TypeVar

from peftsurgery.anatomy import Placed
from peftsurgery.arguments import checked
from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.language.operators import is_same

Predicate = Callable[[Placed], bool]
Function = TypeVar("Function", bound=Predicate)

VOCABULARY = (
    *("attn.q", "attn.k", "attn.v", "attn.o", "attn.qkv", "attn.qk", "attn.kv"),
    *("attn.gate", "attn.q_gate", "attn.qkv_gate"),
    *("ffn.gate", "ffn.up", "ffn.down", "ffn.gate_up", "lm_head", "head"),
    *("moe.router", "ssm.in", "ssm.gate", "ssm.x", "ssm.dt", "ssm.out"),
    *("embed.tokens", "embed.positions", "embed.types"),
)
"""The roles that a model may have; what a given model has besides is known from its sites."""

_registered: dict[str, Predicate] = {}


@checked
def role(name: str) -> Callable[[Function], Function]:
    """Register the decorated predicate as the role ``name``: it is asked about every placed site.

    Raises PSG143 if the name is one that the anatomy gives, or another predicate's.
    """

    def register(predicate: Function) -> Function:
        if name in VOCABULARY or not name or "*" in name:
            raise SurgeryError("PSG143", f"'{name}' cannot be the name of a role of one's own")
        if name in _registered and not is_same(_registered[name], predicate):
            raise SurgeryError("PSG143", f"there is already a role '{name}'")
        _registered[name] = predicate
        return predicate

    return register


@dataclass(frozen=True)
class Roles:
    """The roles that a selection knows: those of the sites, and users' predicates by name.

    ``matched`` says where earlier rules cut: the paths of modules, by the adapter's name and by
    the rule file's.
    """

    found: frozenset[str]
    predicates: Mapping[str, Predicate] = field(default_factory=dict)
    matched: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @staticmethod
    def among(
        sites: Iterable[Placed], matched: Mapping[str, frozenset[str]] | None = None
    ) -> Roles:
        """The roles of ``sites`` and all that are registered."""
        found = {str(site.role) for site in sites if site.role is not None}
        return Roles(frozenset(found), dict(_registered), matched or {})

    def extended(self, name: str, predicate: Predicate) -> Roles:
        """Roles with one more predicate."""
        return replace(self, predicates={**self.predicates, name: predicate})

    def cut_by(self, name: str, where: str | None) -> frozenset[str]:
        """The modules that an earlier adapter or rule cut (PSG145 if there is none such)."""
        if name not in self.matched:
            hint = did_you_mean(name, self.matched) if self.matched else "apply it first"
            raise SurgeryError("PSG145", f"no rule '{name}' was applied before", hint, where)
        return self.matched[name]

    @property
    def known(self) -> frozenset[str]:
        """Every role that may be named."""
        return self.found.union(VOCABULARY, self.predicates)

    def check(self, name: str, where: str | None = None) -> None:
        """Refuse a role that no site could have (PSG142)."""
        if not any(fnmatchcase(known, name) for known in self.known):
            hint = did_you_mean(name, self.known)
            raise SurgeryError("PSG142", f"there is no role '{name}'", hint, where)

    def of(self, site: Placed) -> list[str]:
        """Every role of a site, the anatomy's first."""
        given = [str(site.role)] if site.role is not None else []
        return given + [name for name, holds in self.predicates.items() if holds(site)]
