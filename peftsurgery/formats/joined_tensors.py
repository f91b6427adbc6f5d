"""Tensors of a file that hold several parameters.

A rule file lists for each parameter the name that follows its module's in a file. What begins with
a / is one tensor of the whole model. Parameters under one name are one tensor: the parts of a fused
weight one below the other, in their order in the weight, and the prefixes of all layers side by
side,

    K of (length, kv_heads, head_dim), V, the next K, ...    as (length, 2 layers, ...), flattened
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.language.readings import group_of, shape_of
from peftsurgery.language.schema import Rule
from peftsurgery.surgery.plan.cut import Cut

Shape = tuple[int, ...]


@dataclass(frozen=True)
class JoinedTensor:
    """One tensor of a file: the shapes of the parameters that it holds, and their order.

    ``parts`` are the parameters by their full names, None for a part that nothing fills. Those of
    three dims and more lie side by side, flattened from dim ``flat`` on.
    """

    shapes: dict[str, Shape]
    parts: list[str | None]
    flat: int = 0

    @property
    def beside(self) -> bool:
        """Whether the parameters lie side by side: several of three dims and more, of tokens."""
        return len(self.parts) > 1 and len(next(iter(self.shapes.values()))) > 2

    @property
    def shape(self) -> Shape:
        """The tensor's shape in the file."""
        first = next(iter(self.shapes.values()))
        if len(self.parts) == 1:
            return first
        if not self.beside:
            return (sum(shape[0] for shape in self.shapes.values()), *first[1:])
        whole = (first[0], len(self.parts), *first[1:])
        return (*whole[: self.flat], math.prod(whole[self.flat :]))

    def split(self, key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parameters in a tensor. PSG507 if it has another shape."""
        if tuple(tensor.shape) != self.shape:
            raise SurgeryError(
                "PSG507",
                f"'{key}' has shape {list(tensor.shape)}, where base and config need "
                f"{list(self.shape)}",
                "it was made for another base, or the config has another rank",
            )
        first = next(iter(self.shapes.values()))
        if len(self.parts) == 1:
            return dict.fromkeys(self.shapes, tensor)
        if not self.beside:
            values = tensor.split([shape[0] for shape in self.shapes.values()])
            return dict(zip(self.shapes, values, strict=True))
        parts = tensor.view(first[0], len(self.parts), *first[1:]).unbind(1)
        return {n: value for n, value in zip(self.parts, parts, strict=True) if n is not None}

    def join(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The tensor that holds the parameters; zeros where nothing fills it."""
        own = {name: values[name].detach().cpu() for name in self.shapes}
        if len(self.parts) == 1:
            return own.popitem()[1]
        if not self.beside:
            return torch.cat([*own.values()])
        empty = torch.zeros_like(next(iter(own.values())))
        parts = [empty if name is None else own[name] for name in self.parts]
        return torch.stack(parts, 1).reshape(self.shape)


def joined_tensors(
    cuts: Iterable[Cut],
    named: Callable[[Rule], Mapping[str, str]],
    key_of: Callable[[Cut, str], str],
    flat: int = 0,
) -> dict[str, JoinedTensor]:
    """Tensors that hold the parameters of cuts in a file, by key.

    ``named`` gives a rule's parameters their names in the file, and ``key_of`` the whole key of a
    cut's. A parameter that a group of sites shares has the group's position. PSG507 if parameters
    of one tensor have no shapes alike.
    """
    found: dict[str, list[tuple[str, Shape, int | None]]] = {}
    for cut in sorted(cuts, key=lambda cut: cut.site.slice.start if cut.site.slice else 0):
        names = named(cut.rule)
        for name, suffix in names.items():
            param = cut.rule.params[name]
            shape = tuple(shape_of(param, cut.rule, cut.numbers))
            group = group_of(param, cut.rule, cut.numbers) if param.shared else False
            alike = [other for other in names if names[other] == suffix]
            position = None if isinstance(group, bool) else group * len(alike) + alike.index(name)
            entry = (cut.parameters[name], shape, position)
            found.setdefault(key_of(cut, suffix), []).append(entry)
    return {key: _joined(key, entries, flat) for key, entries in found.items()}


def _joined(key: str, entries: list[tuple[str, Shape, int | None]], flat: int) -> JoinedTensor:
    """The tensor of parameters: each by its name, its shape, and its position if it has one."""
    shapes = {name: shape for name, shape, _ in entries}
    parts: list[str | None] = list(shapes)
    positions = {position: name for name, _, position in entries if position is not None}
    if positions:
        parts = [positions.get(n) for n in range(max(len(entries), max(positions) + 1))]
    joined = JoinedTensor(shapes, parts, flat)
    first = next(iter(shapes.values()))
    start = 0 if joined.beside else 1
    if any(shape[start:] != first[start:] for shape in shapes.values()):
        message = f"'{key}' is one tensor of the whole model, and its layers have no heads alike"
        raise SurgeryError("PSG507", message)
    return joined


def values_of(
    wanted: Mapping[str, JoinedTensor], tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The values of parameters. PSG506 for a tensor that no site takes, PSG507 if one lacks."""
    known: dict[str, torch.Tensor] = {}
    for key, joined in wanted.items():
        if key not in tensors:
            message = f"the adapter's config asks for the tensor '{key}', which is not there"
            raise SurgeryError("PSG507", message, "the file is incomplete")
        known |= joined.split(key, tensors[key])
    for key in tensors:
        if key not in wanted:
            message = f"the tensor '{key}' has no place: the adapter's config does not mean it"
            raise SurgeryError("PSG506", message, did_you_mean(key, wanted))
    return known
