"""analyse: everything one program's graph says about its sites."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import fx

from ..capture import Program
from .flow import Flow
from .feedforward import feedforward_parts
from .feedforward import open_parts as branches_left_open
from .norms import find_norms
from .roles import Part, attention_parts, with_role
from .site import Site
from .stream import find_joins, residual_sites
from .tables import find_convs, find_embeddings, find_parameters


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The sites of a program."""

    sites: tuple[Site, ...]


_known: WeakKeyDictionary[Program, Anatomy] = WeakKeyDictionary()


def analyse(program: Program) -> Anatomy:
    """The anatomy of a program; the same object each time it is asked for."""
    made = _known.get(program)
    if made is None:
        made = _known[program] = _analyse(program)
    return made


def _analyse(program: Program) -> Anatomy:
    flow = Flow(program.graph)
    cores, parts = attention_parts(flow)
    taken = [part.linear for part in parts]
    joins = find_joins(flow)
    parts += feedforward_parts(flow, joins, taken)
    open_parts = branches_left_open(flow, taken)
    linears = linear_sites(flow, parts)
    roles = {site.nodes["y"]: site for site in linears if site.slice is None}
    norms = find_norms(flow)
    tables = [*find_embeddings(flow), *find_convs(flow)]
    residuals = residual_sites(flow, joins, norms, roles)
    known = [*linears, *tables, *norms]
    parameters = find_parameters(flow, program.tensors, known)
    return Anatomy((*linears, *cores, *tables, *residuals, *norms, *parameters))


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
