"""State that one model hands on to another made of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from peftsurgery.surgery.model.adapters import Layers


@dataclass(frozen=True)
class Learnt:
    """State that a model starts with: learnt values and choices of a model or a file.

    ``values`` are those of parameters by names that are the same in all models; ``active`` the
    adapters that take part in a call, and ``left_out`` the layers in which they do nothing;
    ``trains`` says which parameters are trained, if not those that rules say; ``lost`` is the share
    of the changes that an adapter was combined of which it does not have; ``exact`` that the model
    computes as its rules say, operation by operation.
    """

    values: Mapping[str, Tensor] = field(default_factory=dict)
    active: Collection[str] = ()
    left_out: Layers = field(default_factory=dict)
    trains: Mapping[str, bool] = field(default_factory=dict)
    lost: Mapping[str, float] = field(default_factory=dict)
    exact: bool = False
