"""What can be asked of rules, whether their file was checked or only read.

:class:`.schema.Rule` and :class:`.rule_file.RuleFile` answer it, and so do :class:`.page.PageRule`
and :class:`.page.Page`, which are made in a small part of the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from peftsurgery.language.expression import Expression
from peftsurgery.language.kinds import Kind


class SaidParam(Protocol):
    """A parameter that a rule adds: one expression for each dimension."""

    @property
    def shape(self) -> Sequence[Expression]:
        """Sizes, over sizes of the site and settings."""


class SaidRule(Protocol):
    """One rule: see :class:`.schema.Rule` for what each of these is."""

    @property
    def kind(self) -> Kind:
        """The names that the match binds."""

    @property
    def let(self) -> Mapping[str, Expression]:
        """Names for intermediate values."""

    @property
    def params(self) -> Mapping[str, SaidParam]:
        """What the rule adds at each site."""

    @property
    def fold(self) -> Mapping[str, Expression]:
        """The new values of weights by name."""

    def applies(self, settings: Mapping[str, Any]) -> bool:
        """Whether the rule's ``when`` holds with these settings."""


class SaidFile(Protocol):
    """A rule file: see :class:`.rule_file.RuleFile`."""

    @property
    def name(self) -> str:
        """The method's name."""

    @property
    def with_(self) -> Mapping[str, Any]:
        """The settings and their defaults."""

    @property
    def let(self) -> Mapping[str, Expression]:
        """Numbers computed from the settings."""

    @property
    def rules(self) -> Sequence[SaidRule]:
        """The cuts, in their order."""

    def identifying(self, format_name: str) -> Mapping[str, Any]:
        """The config keys whose values identify the method in a file format."""

    def carried(self, format_name: str) -> Mapping[str, str]:
        """The config keys that carry a setting in a file format, and the setting's name."""
