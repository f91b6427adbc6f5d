"""Site interface of the language: what clauses may ask, without the graph.

The anatomy's placed sites are such; tests and other front ends may bring their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol


class FusedPart(Protocol):
    """The site as its program has it: whether it is a part of a fused weight, and which."""

    @property
    def label(self) -> str | None:
        """The part of a fused weight: q, k, v, gate, up."""

    @property
    def whole(self) -> Any:
        """The site of the fused weight that this is a part of."""


class Located(Protocol):
    """A site in one block of a model, under its absolute names."""

    @property
    def site(self) -> FusedPart:
        """The site in its program; blocks of one structure share it."""

    @property
    def kind(self) -> str:
        """linear, attention, embedding, ..."""

    @property
    def role(self) -> str | None:
        """The part in the model that its dataflow shows."""

    @property
    def module(self) -> str:
        """The path of the module."""

    @property
    def parameter(self) -> str | None:
        """The name of the weight."""

    @property
    def block(self) -> str:
        """The path of the block that holds it."""

    @property
    def layer(self) -> int | None:
        """The index of the block in its list."""

    @property
    def type(self) -> str:
        """The class name of the module."""

    @property
    def attention(self) -> str | None:
        """The attention core that it belongs to, or is."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """Sizes and properties by name."""

    @property
    def feeds(self) -> Iterable[Located]:
        """The sites that its value reaches."""

    @property
    def fed_by(self) -> Iterable[Located]:
        """The sites whose values reach it."""
