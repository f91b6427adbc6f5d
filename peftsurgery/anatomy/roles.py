"""Attention sites and the roles of the projections around them, fused ones by their rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from peftsurgery.anatomy.attention import (
    Core,
    depends_on_order,
    projections_out,
    reads_cache,
    visibility,
)
from peftsurgery.anatomy.feeders import PARTS, feeders_of
from peftsurgery.anatomy.flow import Flow
from peftsurgery.anatomy.fused_rows import as_slice
from peftsurgery.anatomy.gates import gate_rows
from peftsurgery.anatomy.ops import Trait, has
from peftsurgery.anatomy.site import Site, Slice
from peftsurgery.anatomy.values import backward, fixed, fixed_width, shape, strip
from peftsurgery.capture.names import common
from peftsurgery.reach import reach


@dataclass(frozen=True, eq=False)
class Assignment:
    """Role of a linear, or of a slice of it, with the attention cores that it serves."""

    linear: Site
    role: str
    cores: tuple[Site, ...] = ()
    label: str | None = None
    slice: Slice | None = None
    kind: str | None = None

    @property
    def facts(self) -> dict[str, str]:
        """The fact ``kind`` of a projection: that of its cores, if they are of one."""
        kinds = {core.facts["kind"] for core in self.cores} or {self.kind}
        return {"kind": kind} if len(kinds) == 1 and (kind := kinds.pop()) else {}


def attention_roles(flow: Flow, cores: Iterable[Core]) -> tuple[list[Site], list[Assignment]]:
    """Attention sites of cores, and the q, k, v and o projections around them."""
    sites: list[Site] = []
    outs: dict[Site, list[Site]] = {}
    served = Served(flow)
    known = list(cores)
    returned = {o for core in known for o in core.results}
    for core in known:
        feeders = feeders_of(flow, core)
        read_by = projections_out(flow, core, returned)
        site = _site(flow, core, feeders, read_by)
        sites.append(site)
        served.note(core, site, feeders)
        for out in read_by:
            outs.setdefault(out, []).append(site)
        if read_by:
            served.note_gates(site, gate_rows(flow, [core.o]))
    projected = [Assignment(out, "attn.o", tuple(those)) for out, those in outs.items()]
    return sites, [*served.assignments(), *projected]


class Served:
    """What linears are projections of: the parts of the cores that read them, and by which rows."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.cores: dict[Site, list[Site]] = {}
        self.rows: dict[Site, dict[str, set[int]]] = {}
        self.through: set[Site] = set()

    def note(self, core: Core, site: Site, feeders: Mapping[str, Sequence[Site]]) -> None:
        """Note a core, its attention site and the linears that its parts come from.

        A linear that another of them reads serves the core itself by its other rows alone: of the
        projection to a latent of keys and values, those that are the keys' rotary part.
        """
        every = {linear for linears in feeders.values() for linear in linears}
        self.through |= {one for linear in every for one in self.flow.origin(linear.nodes["x"])}
        for part, linears in feeders.items():
            for linear in linears:
                rows = self.rows.setdefault(linear, {}).setdefault(part, set())
                for operand in core.operands(part):
                    rows |= self.flow.rows_at(linear, operand, beside=True)
                known = self.cores.setdefault(linear, [])
                known += [] if site in known else [site]

    def note_gates(self, site: Site, gates: Mapping[Site, set[int]]) -> None:
        """Note what the result of a core is multiplied with."""
        for linear, rows in gates.items():
            if linear not in self.through:
                self.rows.setdefault(linear, {}).setdefault("gate", set()).update(rows)
                known = self.cores.setdefault(linear, [])
                known += [] if site in known else [site]

    def assignments(self) -> list[Assignment]:
        """The role of every projection; for a fused one, of the whole and of its slices."""
        made = []
        for linear, rows in self.rows.items():
            cores = tuple(self.cores[linear])
            parts = slices(linear, rows, cores)
            if linear not in self.through:
                made.append(Assignment(linear, role_of(rows), cores))
                parts = parts if len(rows) > 1 else []
            made += parts
        return made


def role_of(parts: Iterable[str]) -> str:
    """The role of a linear that is the projection to all of these: attn.qkv, attn.q_gate."""
    names = sorted(parts, key=("q", "k", "v", "gate").index)
    letters = "".join(name for name in names if name != "gate")
    return "attn." + "_".join(filter(None, (letters, "gate" if "gate" in names else "")))


def slices(
    linear: Site, rows: Mapping[str, set[int]], cores: tuple[Site, ...] = ()
) -> list[Assignment]:
    """The role of each slice, if the rows of each are regular and no two share a row.

    ``cores`` are those that they are for. What is held turned is not cut.
    """
    if "y" in linear.turned:
        return []
    cut = {p: as_slice(found, linear.facts["out"]) for p, found in rows.items()}
    total = set().union(*rows.values())
    if len(total) != sum(map(len, rows.values())):
        return []
    made = [Assignment(linear, f"attn.{p}", cores, p, found) for p, found in cut.items()]
    return made if all(part.slice and rows_of_weight(linear, part.slice) for part in made) else []


def rows_of_weight(linear: Site, taken: Slice) -> Slice | None:
    """The rows of the weight that make some rows of a linear's result; None if not regular."""
    if linear.slice is None:
        return taken
    rows = linear.slice.indices()
    return as_slice([rows[row] for row in taken.indices()], linear.slice.whole)


def _site(
    flow: Flow, core: Core, feeders: Mapping[str, Sequence[Site]], outs: Sequence[Site]
) -> Site:
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
    facts["kind"] = _kind(flow, feeders)
    given = {p for p in PARTS if not feeders[p] and _is_given(flow, nodes[p])}
    lacking = given | _shared(flow, core, feeders)
    facts["unprojected"] = tuple(part for part in PARTS if part in lacking)
    inside = mask_nodes(flow, core)
    facts["causal"] = core.is_causal or depends_on_order(inside) or reads_cache(flow, core)
    inputs = list(flow.graph.find_nodes(op="placeholder"))
    facts["mask_inputs"] = tuple(i for i, node in enumerate(inputs) if node in inside)
    facts["transposed"] = "k" in core.turned
    facts |= fixed_width(nodes["x"]) if "x" in nodes else {}
    module = _around([*(s for sites in feeders.values() for s in sites), *outs])
    return Site("attention", module, None, None, nodes, facts, turned=core.turned)


def _shared(flow: Flow, core: Core, feeders: Mapping[str, Sequence[Site]]) -> set[str]:
    """The parts of a core that are made by the same rows of a linear as others: keys as values."""
    operands = {"q": core.q, "k": core.k, "v": core.v}
    rows = {
        part: {(one, row) for one in sites for row in flow.rows_at(one, operands[part], True)}
        for part, sites in feeders.items()
    }
    pairs = [(one, other) for one in PARTS for other in PARTS if one != other]
    return {one for one, other in pairs if rows[one] & rows[other]}


def mask_nodes(flow: Flow, core: Core) -> set[fx.Node]:
    """Every value from which a core's mask, or its masked scores, are computed."""
    start = [node for node in (core.softmax, core.weights, core.mask) if node is not None]
    return set(backward(start, lambda node: node is core.scores or node in flow.products))


def _head_sizes(flow: Flow, core: Core, feeders: Mapping[str, Sequence[Site]]) -> dict[str, int]:
    """heads, kv_heads, head_dim, and v_head_dim: the size of a value, which may be another."""
    k, v = core.shared
    size, of_value = int(shape(core.q)[-1]), fixed(shape(v)[-2 if "v" in core.turned else -1])
    counts: dict[str, int] = {}
    for part, held in (("q", core.q), ("k", k)):
        rows = [len(flow.rows_at(linear, getattr(core, part))) for linear in feeders[part]]
        if len(rows) == 1 and rows[0] and not (part == "k" and core.keeps_repeats):
            counts[part] = rows[0] // size
        else:  # heads are put together from several projections, or made of none
            counts[part] = int(shape(held)[1]) if len(shape(held)) == 4 else 1
    sizes = {"heads": counts["q"], "kv_heads": counts["k"], "head_dim": size}
    return {**sizes, "v_head_dim": size if of_value is None else of_value}


def _kind(flow: Flow, feeders: Mapping[str, Sequence[Site]]) -> str:
    """Self if queries and keys are made of one value, by whatever projections; else cross."""
    queries, keys = (_read(flow, feeders[part]) for part in "qk")
    return "self" if queries & keys else "cross"


def _read(flow: Flow, linears: Sequence[Site]) -> set[fx.Node]:
    """What linears read, and what linears before them read of which alone that is made."""
    chain = reach(linears, lambda linear: flow.origin(linear.nodes["x"]))
    return {_source(linear) for linear in chain}


def _source(linear: Site) -> fx.Node:
    """What a linear reads; of experts, which read some tokens each, what these are tokens of."""
    x = linear.nodes["x"]
    return strip(x, Trait.LAYOUT | Trait.PICK) if linear.kind == "experts" else x


def _is_given(flow: Flow, node: fx.Node) -> bool:
    """Whether no product makes a value: the program is passed it, or it is a parameter."""
    made = flow.made_of(node, lambda n: n in flow.products)
    return not any(n in flow.products or has(n, Trait.OPAQUE) for n in made)


def _around(linears: Sequence[Site]) -> str:
    """The deepest module that all of these lie in; for one alone, the module around it."""
    path = common([site.module for site in linears])
    return path.rpartition(".")[0] if len({site.parameter for site in linears}) == 1 else path


def with_role(site: Site, given: Assignment, whole: Site | None = None) -> Site:
    """The linear with its role, its core and its slice."""
    facts, rows, label = {**site.facts, **given.facts}, site.slice, given.label
    if given.slice is not None:
        facts["out"] = given.slice.rows
        rows = rows_of_weight(site, given.slice)
    elif rows is not None:
        label = given.role.rpartition(".")[2]
    return replace(
        site,
        role=given.role,
        cores=given.cores,
        facts=facts,
        slice=rows,
        taken=given.slice,
        label=label,
        whole=whole,
    )
