"""analyse: everything one program's graph says about its sites."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import fx

from ..capture import Program
from .flow import Flow
from .roles import Part, attention_parts, with_role
from .site import Site


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The sites of a program."""

    sites: tuple[Site, ...]


_known: WeakKeyDictionary[Program, Anatomy] = WeakKeyDictionary()


def analyse(program: Program) -> Anatomy:
    """The anatomy of a program; the same object each time it is asked for."""
    made = _known.get(program)
    if made is None:
        made = _known[program] = _analyse(program.graph)
    return made


def _analyse(graph: fx.Graph) -> Anatomy:
    flow = Flow(graph)
    cores, parts = attention_parts(flow)
    return Anatomy((*linear_sites(flow, parts), *cores))


def linear_sites(flow: Flow, parts: list[Part]) -> list[Site]:
    """The linears with their roles, each fused one followed by its slices."""
    by_linear: dict[str, list[Part]] = {}
    for part in parts:  # every use of a weight has the role of one of them
        by_linear.setdefault(str(part.linear.parameter), []).append(part)
    sites = []
    for linear in flow.linears:
        mine = by_linear.get(str(linear.parameter), [])
        whole = [part for part in mine if part.slice is None][:1]
        site = with_role(linear, whole[0]) if whole else linear
        sites.append(site)
        sites += [with_role(linear, p, site) for p in mine if p.slice is not None]
    return sites
