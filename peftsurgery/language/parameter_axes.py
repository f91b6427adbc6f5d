"""Which axes of a rule's parameters have which size."""

from __future__ import annotations

from collections.abc import Collection

from peftsurgery.language.schema import Rule


def axes_of(rule: Rule, name: str, sized: Collection[str]) -> list[int]:
    """The axes of a parameter whose size is said in terms of these settings."""
    shape = rule.params[name].shape
    return [axis for axis, size in enumerate(shape) if set(sized) & size.names.keys()]


def sizes_said(rule: Rule, settings: Collection[str]) -> list[str]:
    """The settings that are sizes of a rule's parameters, such as a rank."""
    names = {name for param in rule.params.values() for size in param.shape for name in size.names}
    return [name for name in settings if name in names]


def sized_axes(rule: Rule, size: str) -> dict[str, int]:
    """The axis that has this size, of each parameter that has one."""
    return {
        name: axis
        for name, param in rule.params.items()
        for axis, each in enumerate(param.shape)
        if each.text == size
    }
