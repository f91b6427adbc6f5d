"""Readers of a weight.

A change of one reader's result is a change of the weight only if it is alone.

A rule that rewrites a linear's result changes what that linear computes. Folded, the change is in
the weight, for all that read it: the two agree only if the rule is made at every reader.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from torch import fx

from peftsurgery.anatomy import Placed
from peftsurgery.anatomy.made_weights import made_of
from peftsurgery.anatomy.ops import Trait, has
from peftsurgery.anatomy.site import Site
from peftsurgery.anatomy.values import backward, is_tensor
from peftsurgery.errors import SurgeryError
from peftsurgery.reach import reach
from peftsurgery.surgery.plan.cut import Cut
from peftsurgery.surgery.rewrite.computed_weights import expression


def check_readers(cuts: Iterable[Cut], sites: Iterable[Placed]) -> None:
    """Refuse to fold a change of some readers of a weight that others read as it is. PSG408.

    ``sites`` are all those of the capture that the cuts are in.
    """
    reads: dict[str, list[Placed]] = {}
    parts: dict[tuple[str, str | None], list[Site]] = {}
    for placed in sites:
        if placed.kind == "parameter" and placed.parameter:
            reads.setdefault(placed.parameter, []).append(placed)
        elif placed.slice is not None and placed.site.taken is None:
            parts.setdefault((placed.block, placed.parameter), []).append(placed.site)
    known: dict[Any, fx.Node | None] = {}  # blocks of one shape class are looked at once
    for name, made in _by_weight(cuts):
        ways = {expression(c.site.nodes[n]) for c in made for n, of in c.made.items() if name in of}
        ways |= {name for c in made if name in c.weights.values()}
        if len(ways) > 1:
            raise _has_other_readers(made[0], name, "which computes another weight of it")
        for read in reads.get(name, ()):
            mine = frozenset(cut.site for cut in made if _is_beside(cut, read))
            mine |= {s for s in parts.get((read.block, name), ()) if _is_apart(s, mine)}
            key = (read.site, mine)
            if key not in known:
                known[key] = next(_others(read, mine), None)
            other = known[key]
            if other is not None:
                why = f"({other.name}), which the rule leaves as it is"
                raise _has_other_readers(made[0], name, why)


def _has_other_readers(cut: Cut, name: str, why: str) -> SurgeryError:
    message = f"'{cut.operation.name}' cannot be folded: '{name}' has another reader {why}"
    hint = "let the rule match whatever reads the weight, or ship the saved surgery"
    return SurgeryError("PSG408", message, hint)


def _by_weight(cuts: Iterable[Cut]) -> list[tuple[str, Sequence[Cut]]]:
    """Weights by name, each with the cuts of a rule that change a result and fold into it."""
    found: dict[tuple[Any, int, str], list[Cut]] = {}
    for cut in cuts:
        if cut.rule.kind.result in cut.rule.rewrite:
            for name in changed_names(cut):
                found.setdefault((cut.operation, id(cut.rule), name), []).append(cut)
    return [(name, made) for (_, _, name), made in found.items()]


def changed_names(cut: Cut) -> list[str]:
    """The names of the weights that a cut folds into, and of those that they are computed of."""
    names = {short: (full,) for short, full in cut.weights.items()} | cut.made
    return [full for short in cut.rule.fold.keys() & names for full in names[short]]


def _is_apart(site: Site, mine: Iterable[Site]) -> bool:
    """Whether a site reads none of the rows of a weight that these sites read."""
    rows = set(site.slice.indices()) if site.slice is not None else set[int]()
    return all(s.slice is not None and rows.isdisjoint(s.slice.indices()) for s in mine)


def _is_beside(cut: Cut, read: Placed) -> bool:
    """Whether a cut is in the program, of the same block, in which a parameter is read."""
    return (cut.placed.block, cut.placed.program) == (read.block, read.program)


def _others(read: Placed, sites: Collection[Site]) -> Iterator[fx.Node]:
    """Nodes that read a parameter outside these sites."""
    own = {node for site in sites for node in _inside(site)}
    reads = read.program.graph.find_nodes(op="get_attr", target=read.site.parameter)

    def is_reader(node: fx.Node) -> bool:
        return not has(node, Trait.LAYOUT) and node not in reads

    way = reach(reads, lambda node: (n for n in node.users if n not in own), is_reader)
    return (node for node in filter(is_reader, way) if is_tensor(node) or node.op == "output")


def _inside(site: Site) -> Iterator[fx.Node]:
    """A site's result, and what it is computed from up to what the site binds."""
    made = [site.nodes[name] for name in ("y", "product") if name in site.nodes]
    bound = {node for name, node in site.nodes.items() if name not in made_of(site)}
    bound -= {*made}
    return backward(made[:1], lambda node: node in bound)
