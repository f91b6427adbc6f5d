"""New parameters of a plan: added ones with initial or given values, and trained copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from peftsurgery.capture.names import join
from peftsurgery.errors import SurgeryError
from peftsurgery.language.readings import initial_values, shape_of, weights_read
from peftsurgery.surgery.plan.cut import Cut, copy_name
from peftsurgery.surgery.rewrite.environment import TensorDomain, environment


def new_parameters(
    cuts: Iterable[Cut],
    given: Mapping[str, Tensor],
    dense: Callable[[str], Tensor],
    stored: Callable[[str], Tensor],
    device: torch.device,
) -> dict[str, nn.Parameter]:
    """Make the parameters that cuts add, and the copies that they train, by absolute name.

    A parameter that sites share is there under the name that it has in each of them too. ``given``
    are values to take instead of initial ones; ``dense`` reads a weight of the base for initial
    values, ``stored`` a tensor of it as it is, which may be on meta; ``device`` is for what belongs
    to no weight. PSG308 for a given value of another shape.
    """
    made: dict[str, nn.Parameter] = {}
    for cut in cuts:
        own = join(cut.placed.block, cut.holder)
        if not all(join(own, name) in made for name in cut.parameters):
            starts = _starts(cut, given, made, dense, _device(cut, stored, device))
            for name, value in starts.items():
                param = nn.Parameter(value, requires_grad=cut.rule.params[name].train)
                made[join(own, name)] = made.setdefault(cut.parameters[name], param)
        if cut.rule.train and cut.placed.parameter is not None:
            home = copy_name(cut.placed.parameter, cut.operation.name)
            made[home] = _copy(cut.placed.parameter, home, given, stored)
    return made


def read_weights(cuts: Iterable[Cut], given: Mapping[str, Tensor]) -> bool:
    """Whether initial values that are not ``given`` need the base's weights."""
    return any(
        not cut.site.nodes.keys().isdisjoint(weights_read(param, cut.rule, cut.numbers))
        for cut in cuts
        for name, param in cut.rule.params.items()
        if cut.parameters[name] not in given
    )


def _starts(
    cut: Cut,
    given: Mapping[str, Tensor],
    made: Mapping[str, Tensor],
    dense: Callable[[str], Tensor],
    device: torch.device,
) -> dict[str, Tensor]:
    """Starting values of a cut's parameters: given ones, or evaluated initial ones."""
    known = {}
    for name, full in cut.parameters.items():
        value = made.get(full, given.get(full))
        if value is not None:
            param = cut.rule.params[name]
            _check_shape(full, value, shape_of(param, cut.rule, cut.numbers))
            known[name] = value.detach().to(device=device, dtype=getattr(torch, param.dtype))
    return initial_values(cut.rule, environment(cut, TensorDomain(dense)), known, device=device)


def _device(cut: Cut, stored: Callable[[str], Tensor], other: torch.device) -> torch.device:
    """Device of a cut's parameters: that of its site's weight, unless it is on meta."""
    name = cut.placed.parameter
    device = other if name is None else stored(name).device
    return torch.device("cpu") if device.type == "meta" else device


def _copy(
    name: str, home: str, given: Mapping[str, Tensor], stored: Callable[[str], Tensor]
) -> nn.Parameter:
    """Trainable copy of a base parameter, with the value given for it, if any."""
    mine = stored(name)
    value = given.get(home, given.get(name, mine)).detach()
    _check_shape(name, value, mine.shape)
    # a value that is given waits for the base's weights where it is, others are read with them
    device = value.device if mine.is_meta else mine.device
    return nn.Parameter(value.to(device=device, dtype=mine.dtype, copy=True))


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != tuple(shape):
        message = f"'{name}' has shape {list(value.shape)}, where {list(shape)} is needed"
        raise SurgeryError("PSG308", message)
