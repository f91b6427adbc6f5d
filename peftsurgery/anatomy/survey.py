"""Survey of a model: the sites of every block, under absolute names.

A program is analysed once. What depends on where its block is called is added here: whether a mask
that is passed in orders the tokens, whether a block's output joins the stream of its caller, what
kind of sublayer a called block is, and which linear is the model's head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from peftsurgery.anatomy.analysis import Anatomy, analyse
from peftsurgery.anatomy.attention import compares_order
from peftsurgery.anatomy.calls import Calls, Frame
from peftsurgery.anatomy.heads import find_heads
from peftsurgery.anatomy.inputs import find_inputs
from peftsurgery.anatomy.residual import call_of, sublayer
from peftsurgery.anatomy.site import Placed, Relations, Site
from peftsurgery.anatomy.towers import Towers
from peftsurgery.capture import Capture, Program
from peftsurgery.capture.names import join
from peftsurgery.reach import reach


def survey(capture: Capture) -> tuple[Placed, ...]:
    """The sites of a capture, block by block. A program is analysed once, whoever runs it."""
    calls = Calls(capture.programs)
    surveyor = _Surveyor(calls, Towers(capture.top, calls))
    found = [placed for frame in surveyor.calls.frames for placed in surveyor.sites_of(frame)]
    surveyor.neighbours.know(found)
    inputs = find_inputs(capture)
    if inputs is not None:
        kind = capture.top.kind
        found.append(Placed(inputs, "", capture.top, type=kind, relations=surveyor.neighbours))
    return tuple(found)


def unread_cores(capture: Capture) -> list[str]:
    """The modules whose attention cores are no sites, for all blocks of a capture."""
    return [
        join(frame.path, module)
        for frame in Calls(capture.programs).frames
        for module in analyse(frame.program).unread
    ]


class _Neighbours(Relations):
    """Neighbour relation of placed sites within a block."""

    def __init__(self) -> None:
        self.placed: dict[tuple[str, Site], Placed] = {}
        self.inverse: dict[Program, dict[Site, list[Site]]] = {}

    def know(self, found: list[Placed]) -> None:
        self.placed = {(placed.block, placed.site): placed for placed in found}

    def feeds(self, placed: Placed) -> tuple[Placed, ...]:
        reached = analyse(placed.program).links.get(placed.site, ())
        return self._at(placed.block, reached)

    def fed_by(self, placed: Placed) -> tuple[Placed, ...]:
        if placed.program not in self.inverse:
            inverse = self.inverse[placed.program] = {}
            for source, targets in analyse(placed.program).links.items():
                for target in targets:
                    inverse.setdefault(target, []).append(source)
        return self._at(placed.block, self.inverse[placed.program].get(placed.site, ()))

    def _at(self, block: str, sites: Any) -> tuple[Placed, ...]:
        found = (self.placed.get((block, site)) for site in sites)
        return tuple(placed for placed in found if placed is not None)


class _Surveyor:
    """Places the sites of every frame of one capture."""

    def __init__(self, calls: Calls, towers: Towers) -> None:
        self.calls, self.towers = calls, towers
        self.neighbours = _Neighbours()
        self.lists = self._lists()
        self.ordered: dict[tuple[Program, fx.Node], bool] = {}

    def _lists(self) -> frozenset[str]:
        """The paths of the model's lists of layers: ModuleLists, and whatever holds blocks."""
        found = {frame.path.rpartition(".")[0] for frame in self.calls.frames if frame.path}
        for frame in self.calls.frames:
            if not frame.path:
                infos = frame.program.modules
                found |= {name for name, info in infos.items() if info.type == "ModuleList"}
        return frozenset(found)

    def sites_of(self, frame: Frame) -> list[Placed]:
        """The sites of a frame with what its callers add to them."""
        path, program = frame.path, frame.program
        anatomy = analyse(program)
        sites = anatomy.joined if self.joins_stream(frame, anatomy) else anatomy.sites
        heads = self.heads(anatomy) if not path else {}
        return [
            Placed(
                site,
                path,
                program,
                layer_index(join(path, site.module), self.lists),
                type_of(program, site),
                attentions_of(site, path),
                self.extra(frame, site, heads) | self.tower(frame, site),
                self.neighbours,
            )
            for site in sites
        ]

    def tower(self, frame: Frame, site: Site) -> dict[str, Any]:
        """The tower that a site is in, as a fact."""
        found = self.towers.of(frame, site)
        return {} if found is None else {"tower": found}

    def extra(self, frame: Frame, site: Site, heads: Mapping[fx.Node, str]) -> dict[str, Any]:
        """Facts of a site that depend on the callers of its block."""
        if site.kind == "attention":
            return self.of_core(frame, site)
        if site.kind == "residual" and site.facts["after"] == "other":
            call = call_of(site.nodes["h"])
            callee = None if call is None else self.calls.callee(frame, call)
            if callee is not None:
                return sublayer(analyse(callee.program).ends)
        if site.kind == "positions":
            found = self.core_of(frame, site)
            return {"causal": found is not None and self.orders(*found)}
        if site.kind == "linear" and site.nodes["y"] in heads:
            return {"role": heads[site.nodes["y"]]}
        if site.kind == "parameter" and site.role is None and heads:
            return self.head_of(frame, site, heads)
        return {}

    def of_core(self, frame: Frame, site: Site) -> dict[str, Any]:
        """Facts of a core: whether it is causal, and what it has no projection of its own for."""
        found: dict[str, Any] = {"causal": True} if self.orders(frame, site) else {}
        origins = {part: self.origin(frame, site.nodes[part]) for part in site.facts["unprojected"]}
        known = (part for part, origin in origins.items() if origin is not None)
        found["unprojected"] = tuple(f"attn.{part}" for part in known)
        kinds = {core.facts["kind"] for core in origins.get("k") or ()}
        return found | ({"kind": kinds.pop()} if len(kinds) == 1 else {})

    def origin(self, frame: Frame, node: fx.Node) -> list[Site] | None:
        """The cores of other blocks whose projections a value that a block is passed comes from.

        None if it comes from a product that serves no core: from a projection that is not known.
        """

        def is_product(at: tuple[Frame, fx.Node]) -> bool:
            return at[1] in analyse(at[0].program).flow.products

        made = [at for at in self.calls.walk(frame, node, is_product) if is_product(at)]
        lent = {(at, analyse(at.program).flow.products[product].parameter) for at, product in made}
        cores = [
            core
            for at, parameter in lent
            for site in analyse(at.program).sites
            if site.kind == "linear" and site.parameter == parameter
            for core in site.cores
        ]
        return cores if cores or not lent else None

    def head_of(self, frame: Frame, site: Site, heads: Mapping[fx.Node, str]) -> dict[str, Any]:
        """Role of a parameter that a head linear reads: the head's role."""
        for linear in analyse(frame.program).flow.linears:
            read = {str(linear.nodes[name].target) for name in "Wb" if name in linear.nodes}
            if site.parameter in read and linear.nodes["y"] in heads:
                return {"role": heads[linear.nodes["y"]]}
        return {}

    def core_of(self, frame: Frame, site: Site) -> tuple[Frame, Site] | None:
        """The attention that positions are for, and where it is: the first that they come to."""
        if site.cores:
            return frame, site.cores[0]

        def called(node: fx.Node) -> Frame | None:
            return self.calls.callee(frame, node) if node.op == "call_module" else None

        way = reach([site.nodes["y"]], lambda node: node.users, lambda node: bool(called(node)))
        return next(
            (
                (callee, core)
                for callee in map(called, way)
                if callee is not None
                for core in analyse(callee.program).sites
                if core.kind == "attention"
            ),
            None,
        )

    def orders(self, frame: Frame, core: Site) -> bool:
        """Whether a core hides later tokens from earlier ones."""
        return bool(core.facts["causal"]) or self.is_ordered(frame, core)

    def is_ordered(self, frame: Frame, site: Site) -> bool:
        """Whether the mask that a core is passed tells earlier from later tokens."""
        passed = (
            (call.frame, call.node.args[number])
            for call in self.calls.callers(frame)
            for number in site.facts["mask_inputs"]
        )
        return any(isinstance(mask, fx.Node) and self._compares(at, mask) for at, mask in passed)

    def _compares(self, frame: Frame, node: fx.Node) -> bool:
        key = (frame.program, node)
        if frame.path or key not in self.ordered:
            found = self.calls.walk(frame, node)
            self.ordered[key] = any(compares_order(n) for _, n in found)
        return self.ordered[key]

    def joins_stream(self, frame: Frame, anatomy: Anatomy) -> bool:
        """Whether some caller adds the block's output to the stream that it read."""
        if anatomy.joined is anatomy.sites:
            return False
        return any(
            call_of(leaf) is call.node
            for call in self.calls.callers(frame)
            for found in analyse(call.frame.program).joins
            for leaf in found.leaves
        )

    def heads(self, anatomy: Anatomy) -> dict[fx.Node, str]:
        """The heads of the model by their y."""
        tables = [
            site
            for program in {frame.program for frame in self.calls.frames}
            for site in analyse(program).sites
            if site.kind == "embedding" and site.role == "embed.tokens"
        ]
        taken = {site.nodes["y"] for site in anatomy.sites if site.kind == "linear" and site.role}
        return find_heads(anatomy.flow, tables, taken)


def layer_index(path: str, lists: frozenset[str]) -> int | None:
    """The index of the list element that a module lies in; of the outermost if lists are nested."""
    names = path.split(".")
    for depth, name in enumerate(names):
        if name.isdigit() and ".".join(names[:depth]) in lists:
            return int(name)
    return None


def type_of(program: Program, site: Site) -> str:
    """The class name of the module that a site belongs to."""
    info = program.modules.get(site.module)
    return program.kind if info is None else info.type


def attentions_of(site: Site, path: str) -> tuple[str, ...]:
    """The ids of the cores that a site serves, or is: each unique in a model."""
    cores = (site,) if site.kind == "attention" else site.cores
    return tuple(f"{join(path, core.module)}:{core.nodes['o'].name}" for core in cores)
