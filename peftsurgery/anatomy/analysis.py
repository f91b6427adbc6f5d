"""Analysis of one program: its sites with their roles, computed once and kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from weakref import WeakKeyDictionary

from torch import fx

from peftsurgery.anatomy.attention import find_cores
from peftsurgery.anatomy.convs import find_convs
from peftsurgery.anatomy.embeddings import find_embeddings
from peftsurgery.anatomy.feedforward import feedforward_roles, open_roles
from peftsurgery.anatomy.feeds import find_links
from peftsurgery.anatomy.flow import Flow
from peftsurgery.anatomy.linear_attention import linear_attention_roles
from peftsurgery.anatomy.norms import find_norms
from peftsurgery.anatomy.parameters import find_parameters
from peftsurgery.anatomy.positions import find_positions
from peftsurgery.anatomy.recurrence import recurrent_roles
from peftsurgery.anatomy.residual import Join, find_joins, owner, residual_sites
from peftsurgery.anatomy.roles import Assignment, attention_roles, with_role
from peftsurgery.anatomy.routing import router_roles
from peftsurgery.anatomy.site import Site, Slice
from peftsurgery.capture import Program


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The sites of a program.

    ``joined`` are the sites if what the program returns joins a stream in its callers: a block that
    is no more than a perceptron is a feed-forward there, and cannot know it. ``ends`` are the
    linears that make the outputs, as ``joined`` has them. ``unread`` are the modules whose
    attention cores cannot be sites.
    """

    flow: Flow
    joins: Sequence[Join]
    sites: tuple[Site, ...]
    joined: tuple[Site, ...]
    ends: tuple[Site, ...]
    unread: tuple[str, ...] = ()

    @cached_property
    def links(self) -> Mapping[Site, tuple[Site, ...]]:
        """Mapping of each site to the sites that its output reaches within the program."""
        made = find_links(self.flow, self.sites)
        return made if self.joined is self.sites else made | find_links(self.flow, self.joined)


_known: WeakKeyDictionary[Program, Anatomy] = WeakKeyDictionary()


def analyse(program: Program) -> Anatomy:
    """The anatomy of a program; the same object each time it is asked for."""
    made = _known.get(program)
    if made is None:
        made = _known[program] = _analyse(program)
    return made


def _analyse(program: Program) -> Anatomy:
    flow = Flow(program.graph, {n for n, info in program.tensors.items() if info.parameter})
    read, unread = find_cores(flow)
    every, assigned = attention_roles(flow, read)
    cores = [site for site in every if site.nodes["o"] not in unread]
    taken = [each.linear for each in assigned]
    joins = find_joins(flow)
    assigned += recurrent_roles(flow, joins, taken)
    assigned += linear_attention_roles(flow, [each.linear for each in assigned])
    assigned += router_roles(flow)
    assigned += feedforward_roles(flow, joins, [each.linear for each in assigned])
    more = open_roles(flow, [each.linear for each in assigned])
    linears = linear_sites(flow, assigned)
    norms = find_norms(flow)
    tables = [*find_embeddings(flow), *conv_sites(flow, [*assigned, *more])]
    residuals = residual_sites(flow, joins, norms, by_output(linears))
    parameters = find_parameters(flow, program.tensors, [*linears, *tables, *norms])
    positions = find_positions(flow, tables, cores)
    rest = (*cores, *tables, *residuals, *norms, *parameters, *positions)
    sites = (*linears, *rest)
    all_linears = linear_sites(flow, [*assigned, *more]) if more else linears
    joined = (*all_linears, *rest) if more else sites
    roles = by_output(all_linears)
    modules = {site.nodes["o"]: site.module for site in every}
    hidden = tuple(modules[o] if o in modules else owner(o) for o in unread)
    last = (linear.nodes["y"] for node in flow.outputs for linear in flow.origin(node))
    ends = tuple(roles[y] for y in last if y in roles)  # a convolution without a role is no linear
    return Anatomy(flow, joins, sites, joined, ends, hidden)


def by_output(linears: Sequence[Site]) -> dict[fx.Node, Site]:
    """The linears by their y, wholes only."""
    return {site.nodes["y"]: site for site in linears if site.taken is None}


def conv_sites(flow: Flow, assigned: Iterable[Assignment]) -> list[Site]:
    """The convolutions, with the roles of those that are projections in groups."""
    wholes = [part for part in assigned if part.linear.kind == "conv" and part.slice is None]
    roles = {part.linear.nodes["y"]: part for part in wholes}
    found = find_convs(flow.nodes)
    return [with_role(s, roles[s.nodes["y"]]) if s.nodes["y"] in roles else s for s in found]


def _merged(parts: Sequence[Assignment]) -> list[Assignment]:
    """One assignment for each role of a weight's rows, with the cores of all of its uses."""
    made: dict[tuple[str, Slice | None], Assignment] = {}
    for part in parts:
        known = made.setdefault((part.role, part.slice), part)
        cores = tuple(dict.fromkeys((*known.cores, *part.cores)))
        made[part.role, part.slice] = replace(known, cores=cores)
    return list(made.values())


def linear_sites(flow: Flow, assigned: Sequence[Assignment]) -> list[Site]:
    """The linears with their roles, each fused one followed by its slices."""
    by_linear: dict[tuple[str | None, Slice | None], list[Assignment]] = {}
    for part in assigned:  # every use of a weight has the role of one of them, and serves all cores
        by_linear.setdefault((part.linear.parameter, part.linear.slice), []).append(part)
    by_linear = {weight: _merged(parts) for weight, parts in by_linear.items()}
    sites = []
    for linear in flow.products.values():
        mine = by_linear.get((linear.parameter, linear.slice), [])
        if linear.kind == "conv" or ("pointwise" in linear.facts and not mine):
            continue  # a convolution in groups, or without a role
        whole = [part for part in mine if part.slice is None][:1]
        site = with_role(linear, whole[0]) if whole else linear
        sites.append(site)
        sites += [with_role(linear, p, site) for p in mine if p.slice is not None]
    return sites
