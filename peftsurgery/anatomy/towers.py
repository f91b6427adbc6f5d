"""Towers: what of a model reads text, images or sound, told by what its inputs reach.

    text         what tokens reach, alone or after an image joined them
    vision       what images reach before they join the text's stream
    audio        what sound reaches before that
    connector    of these, what is multiplied after the last layer of such a tower, on its way there

Tokens are what tables of tokens are asked for. A tensor of real numbers is sound if it is convolved
along one axis, and an image if along more; where transformers has a name for the argument, the name
is taken at its word. Layers of a list are a tower's if they read each other. What a block is called
with is what its sites read; no tower is told where a value is made of no input.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import fx

from peftsurgery.anatomy.analysis import analyse
from peftsurgery.anatomy.calls import Calls, Frame
from peftsurgery.anatomy.embeddings import given_ids
from peftsurgery.anatomy.model_arguments import SENSES, TOKENS
from peftsurgery.anatomy.ops import Trait, has
from peftsurgery.anatomy.site import Site
from peftsurgery.anatomy.values import operands, shape, value
from peftsurgery.capture import Program
from peftsurgery.reach import reach

TEXT, VISION, AUDIO, CONNECTOR = "text", "vision", "audio", "connector"
Senses = frozenset[str]
NONE: Senses = frozenset()


class Towers:
    """The towers of the frames and sites of one capture."""

    def __init__(self, top: Program, calls: Calls) -> None:
        self.top, self.calls = top, calls
        self.found: dict[Frame, set[str]] = {}
        given = _given(top)
        every = set(given.values())
        self.only = every.pop() if len(every) == 1 else None
        self.of_nodes: Mapping[fx.Node, Senses] = {}
        self.connecting: frozenset[fx.Node] = frozenset()
        if len(given) > 1 and self.only is None:
            frame = next(frame for frame in calls.frames if not frame.path)
            start = {node: frozenset((sense,)) for node, sense in given.items()}
            self.of_nodes = self._follow(frame, start)
            self.connecting = self._connectors(frame)
            for node in self.connecting:
                self._call(frame, node, frozenset((CONNECTOR,)))

    def of(self, frame: Frame, site: Site) -> str | None:
        """The tower of a site; None if no input reaches it."""
        if self.only is not None or not self.of_nodes:
            return self.only
        if frame.path:
            return _named(self.found.get(frame, ()))
        start = next((site.nodes[n] for n in ("y", "o", "W") if n in site.nodes), None)
        way = () if start is None else reach([start], lambda n: n.users, self._is_reached)
        reached = next((node for node in way if self._is_reached(node)), None)
        if reached is None:
            return None
        return CONNECTOR if reached in self.connecting else _named(self.of_nodes[reached])

    def _is_reached(self, node: fx.Node) -> bool:
        return bool(self.of_nodes.get(node))

    def _follow(self, frame: Frame, given: Mapping[fx.Node, Senses]) -> dict[fx.Node, Senses]:
        """What every node of a frame is made of, and what every block is called with."""
        made = dict(given)
        for node in frame.program.graph.nodes:
            if node not in made:
                made[node] = NONE.union(*(made.get(source, NONE) for source in operands(node)))
            if node.op == "call_module":
                self._call(frame, node, made[node], made)
        return made

    def _call(
        self,
        frame: Frame,
        node: fx.Node,
        senses: Senses,
        made: Mapping[fx.Node, Senses] | None = None,
    ) -> None:
        """Note what a block is called with, and the blocks within it."""
        callee = self.calls.callee(frame, node) if node.op == "call_module" else None
        if callee is None:
            return
        self.found.setdefault(callee, set()).update(senses)
        taken = callee.program.graph.find_nodes(op="placeholder")
        passed = dict(zip(taken, node.args, strict=False))
        known = {
            inner: senses if made is None else made.get(value, NONE)
            for inner, value in passed.items()
            if isinstance(value, fx.Node)
        }
        if callee.program.graph.find_nodes(op="call_module"):
            self._follow(callee, known)

    def _connectors(self, top: Frame) -> frozenset[fx.Node]:
        """The nodes between the last layer of a tower and the text, from the first product on."""
        nodes = list(top.program.graph.nodes)
        before = {n for n in nodes if self.of_nodes[n] and TEXT not in self.of_nodes[n]}
        behind: dict[fx.Node, set[str]] = {}
        layers: set[fx.Node] = set()
        for node in nodes:  # the lists whose layers a value comes from; some of them read others
            lists = set().union(*(behind.get(source, ()) for source in operands(node)))
            if node.op == "call_module" and node in before:
                path = str(node.target).rpartition(".")[0]
                layers |= {node} if path in lists else set()
                lists = lists | {path}
            behind[node] = lists
        chained = {str(node.target).rpartition(".")[0] for node in layers}
        layers |= {
            n
            for n in before
            if n.op == "call_module" and str(n.target).rpartition(".")[0] in chained
        }
        within = set(reach(layers, operands))
        products = analyse(top.program).flow.products
        beyond: set[fx.Node] = set()
        for node in nodes:
            if node in before and node not in within and behind[node] & chained:
                is_weighted = node in products or node.op == "call_module" or has(node, Trait.CONV)
                if is_weighted or any(source in beyond for source in operands(node)):
                    beyond.add(node)
        return frozenset(beyond & _reaching(nodes, self.of_nodes, products))


def _reaching(
    nodes: Sequence[fx.Node], senses: Mapping[fx.Node, Senses], products: Collection[fx.Node]
) -> set[fx.Node]:
    """The nodes that text is multiplied with, or that blocks of text are called with."""
    weighted = (n for n in nodes if n in products or n.op == "call_module")
    return set(reach([n for n in weighted if TEXT in senses[n]], operands))


def _given(top: Program) -> dict[fx.Node, str]:
    """The inputs of a model that are text, images or sound."""
    tables = (site for site in analyse(top).sites if site.kind == "embedding")
    tokens = {given_ids(site.nodes["x"]) for site in tables if site.role == "embed.tokens"}
    found = {}
    for node in top.graph.find_nodes(op="placeholder"):
        sense = TEXT if node in tokens or node.name in TOKENS.values() else SENSES.get(node.name)
        sense = sense or _sense(node)
        if sense is not None:
            found[node] = sense
    return found


def _sense(node: fx.Node) -> str | None:
    """What an input of real numbers is, by the first convolution that reads it."""
    found = value(node)
    if not isinstance(found, torch.Tensor) or not found.is_floating_point() or found.dim() < 2:
        return None
    first = next(_convolutions(node), None)
    if first is None:
        return None
    return AUDIO if len(shape(first.all_input_nodes[1])) == 3 else VISION


def _convolutions(node: fx.Node) -> Iterator[fx.Node]:
    """The convolutions that a value reaches by changes of its layout and scale."""
    kept = Trait.LAYOUT | Trait.CAST | Trait.SCALING | Trait.ADDITION | Trait.RESHAPE
    way = reach([node], lambda n: n.users, lambda n: n is not node and not has(n, kept))
    return (n for n in way if has(n, Trait.CONV))


def _named(senses: Iterable[str]) -> str | None:
    """The tower of what is made of these: of text, whatever joined it."""
    known = set(senses)
    for name in (CONNECTOR, TEXT):
        if name in known:
            return name
    return known.pop() if len(known) == 1 else None
