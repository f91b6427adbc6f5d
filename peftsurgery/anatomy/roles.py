"""Attention sites and the roles of the projections around them, fused ones by their rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from peftsurgery.anatomy.attention import (
    Core,
    depends_on_order,
    projection_out,
    reads_cache,
    visibility,
)
from peftsurgery.anatomy.flow import Flow
from peftsurgery.anatomy.fused_rows import as_slice
from peftsurgery.anatomy.site import Site, Slice
from peftsurgery.anatomy.values import backward, fixed_width, shape
from peftsurgery.capture.names import common

PARTS = ("q", "k", "v")


@dataclass(frozen=True, eq=False)
class Assignment:
    """Role of a linear, or of a slice of it, with the attention core that it serves."""

    linear: Site
    role: str
    core: Site | None = None
    label: str | None = None
    slice: Slice | None = None


def attention_roles(flow: Flow, cores: Iterable[Core]) -> tuple[list[Site], list[Assignment]]:
    """Attention sites of cores, and the q, k, v and o projections around each."""
    sites: list[Site] = []
    roles: list[Assignment] = []
    for core in cores:
        feeders = _feeders(flow, core)
        out = projection_out(flow, core)
        site = _site(flow, core, feeders, out)
        sites.append(site)
        roles += _projections(flow, core, site, feeders)
        if out is not None:
            roles.append(Assignment(out, "attn.o", site))
    return sites, roles


def _feeders(flow: Flow, core: Core) -> dict[str, list[Site]]:
    operands = {"q": core.q, "k": core.k, "v": core.v}
    return {
        part: sorted(flow.origin(node), key=lambda s: flow.order[s.nodes["y"]])
        for part, node in operands.items()
    }


def _projections(
    flow: Flow, core: Core, site: Site, feeders: Mapping[str, Sequence[Site]]
) -> list[Assignment]:
    """The role of every projection; for a fused one, of the whole and of its slices."""
    shared: dict[Site, list[str]] = {}
    for part in PARTS:
        for linear in feeders[part]:
            shared.setdefault(linear, []).append(part)
    made = []
    for linear, letters in shared.items():
        made.append(Assignment(linear, "attn." + "".join(letters), site))
        if len(letters) > 1:
            rows = {p: flow.rows_at(linear, getattr(core, p)) for p in letters}
            made += slices(linear, rows, site)
    return made


def slices(linear: Site, rows: Mapping[str, set[int]], site: Site | None) -> list[Assignment]:
    """The role of each slice, if the rows of each are regular and no two share a row.

    ``site`` is the core that they are for. What is held turned is not cut.
    """
    if "y" in linear.turned:
        return []
    cut = {p: as_slice(found, linear.facts["out"]) for p, found in rows.items()}
    total = set().union(*rows.values())
    if any(s is None for s in cut.values()) or len(total) != sum(map(len, rows.values())):
        return []
    return [Assignment(linear, f"attn.{p}", site, p, found) for p, found in cut.items()]


def _site(flow: Flow, core: Core, feeders: Mapping[str, Sequence[Site]], out: Site | None) -> Site:
    k, v = core.shared
    nodes = {"q": core.q, "k": k, "v": v, "o": core.o}
    nodes |= {"q_operand": core.q, "k_operand": core.k, "v_operand": core.v}
    mask = None if core.mask is None else visibility(core.mask)
    extra = {"mask": mask, "scores": core.scores, "softmax": core.softmax}
    nodes |= {name: node for name, node in extra.items() if node is not None}
    read = {site.nodes["x"] for site in feeders["q"]}
    nodes |= {"x": read.pop()} if len(read) == 1 else {}
    facts: dict[str, Any] = {"op": "sdpa" if core.fused is not None else "softmax"}
    facts |= _head_sizes(flow, core, feeders)
    facts["kind"] = _kind(feeders)
    inside = mask_nodes(flow, core)
    facts["causal"] = core.is_causal or depends_on_order(inside) or reads_cache(flow, core)
    inputs = list(flow.graph.find_nodes(op="placeholder"))
    facts["mask_inputs"] = tuple(i for i, node in enumerate(inputs) if node in inside)
    facts["transposed"] = core.transposed
    facts |= fixed_width(nodes["x"]) if "x" in nodes else {}
    module = _around([*(s for sites in feeders.values() for s in sites), *([out] if out else [])])
    return Site("attention", module, None, None, nodes, facts)


def mask_nodes(flow: Flow, core: Core) -> set[fx.Node]:
    """Every value from which a core's mask, or its masked scores, are computed."""
    start = [node for node in (core.softmax, core.mask) if node is not None]
    return set(backward(start, lambda node: node is core.scores or node in flow.products))


def _head_sizes(flow: Flow, core: Core, feeders: Mapping[str, Sequence[Site]]) -> dict[str, int]:
    """heads, kv_heads and head_dim."""
    size = int(shape(core.q)[-1])
    counts: dict[str, int] = {}
    for part, held in (("q", core.q), ("k", core.shared[0])):
        rows = sum(len(flow.rows_at(linear, getattr(core, part))) for linear in feeders[part])
        if rows and not (part == "k" and core.keeps_repeats):
            counts[part] = rows // size
        else:
            counts[part] = int(shape(held)[1]) if len(shape(held)) == 4 else 1
    return {"heads": counts["q"], "kv_heads": counts["k"], "head_dim": size}


def _kind(feeders: Mapping[str, Sequence[Site]]) -> str:
    queries = {s.nodes["x"] for s in feeders["q"]}
    keys = {s.nodes["x"] for s in feeders["k"]}
    return "self" if queries & keys else "cross"


def _around(linears: Sequence[Site]) -> str:
    """The deepest module that all of these lie in; for one alone, the module around it."""
    path = common([site.module for site in linears])
    return path.rpartition(".")[0] if len({site.parameter for site in linears}) == 1 else path


def with_role(site: Site, given: Assignment, whole: Site | None = None) -> Site:
    """The linear with its role, its core and its slice."""
    facts = dict(site.facts)
    if given.slice is not None:
        facts["out"] = given.slice.rows
    return replace(
        site,
        role=given.role,
        core=given.core,
        facts=facts,
        slice=given.slice,
        label=given.label,
        whole=whole,
    )
