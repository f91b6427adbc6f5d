"""Which axes of a rule's parameters have which size."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from peftsurgery.language.expression import Expression
from peftsurgery.language.said import SaidRule


def axes_of(rule: SaidRule, name: str, sized: Collection[str]) -> list[int]:
    """The axes of a parameter whose size is said in terms of these settings."""
    shape = rule.params[name].shape
    return [axis for axis, size in enumerate(shape) if set(sized) & _names(rule, size)]


def sizes_said(rule: SaidRule, settings: Iterable[str]) -> list[str]:
    """The settings that are sizes of a rule's parameters, such as a rank."""
    sizes = (size for param in rule.params.values() for size in param.shape)
    names = {name for size in sizes for name in _names(rule, size)}
    return [name for name in settings if name in names]


def _names(rule: SaidRule, size: Expression) -> set[str]:
    """The names that a size reads, and those that `let` has another name for among these."""
    return {*size.names} | {rule.let[name].text for name in size.names if name in rule.let}


def sized_axes(rule: SaidRule, size: str) -> dict[str, int]:
    """The axis that has this size, of each parameter that has one."""
    return {
        name: axis
        for name, param in rule.params.items()
        for axis, each in enumerate(param.shape)
        if each.text == size
    }
