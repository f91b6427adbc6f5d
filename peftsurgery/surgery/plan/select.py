"""Selection of cuts: where the rules of an operation cut in a capture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import fx

from peftsurgery.anatomy import Placed, survey
from peftsurgery.anatomy.site import Site
from peftsurgery.capture import Capture
from peftsurgery.capture.names import is_within
from peftsurgery.capture.stack import stack_paths
from peftsurgery.language.clauses import LACKS
from peftsurgery.language.expression import Expression
from peftsurgery.language.pattern_search import Match, find_pattern, nearest_miss
from peftsurgery.language.schema import Rule
from peftsurgery.language.selection import Selection, select
from peftsurgery.surgery.plan.cut import Cut, Operation
from peftsurgery.surgery.plan.fusion import common_spots


def select_cuts(
    capture: Capture, operation: Operation, before: Iterable[Cut] = ()
) -> tuple[list[Cut], list[Selection]]:
    """Select the sites of an operation's rules in a capture; returns cuts and selections.

    ``before`` are the cuts of the operations that come first; the rules of a file know each other's
    too. A rule over adapters has only sites where all of them cut.
    """
    earlier, file, settings = list(before), operation.file, operation.settings
    sites = survey(capture)
    cuts: list[Cut] = []
    selections: list[Selection] = []
    for number, rule in enumerate(file.rules):
        if not rule.applies(settings):
            continue
        name = operation.name + (f".rules[{number}]" if len(file.rules) > 1 else "")
        candidates = [*sites, *(pattern_sites(sites, rule) if rule.pattern else ())]
        spots = common_spots(rule.fused(settings), earlier)
        if rule.over:
            candidates = [placed for placed in candidates if (placed.block, placed.site) in spots]
        matched = _modules([*earlier, *cuts])
        chosen = select(candidates, rule, settings, file.roles, name, matched, operation.where)
        selections.append(chosen)
        cuts += [
            Cut(operation, rule, placed, spots.get((placed.block, placed.site), ()))
            for placed in chosen.kept
        ]
    return cuts, selections


def _modules(cuts: Iterable[Cut]) -> dict[str, frozenset[str]]:
    """The modules that were cut, by the adapter's name and by the rule file's."""
    found: dict[str, set[str]] = {}
    for cut in cuts:
        for name in (cut.operation.name, cut.operation.file.name):
            found.setdefault(name, set()).add(cut.placed.module)
    return {name: frozenset(modules) for name, modules in found.items()}


def pattern_sites(sites: Iterable[Placed], rule: Rule) -> list[Placed]:
    """A site for every occurrence of the rule's pattern, in every block.

    If there is none, the nearest in each program, with what it lacks as a fact: no rule keeps it.
    """
    pattern = rule.pattern
    assert pattern is not None
    found = _in_blocks(sites, lambda graph: [(match, {}) for match in find_pattern(pattern, graph)])
    return found or _in_blocks(sites, lambda graph: _nearest(pattern, graph))


def _nearest(pattern: Expression, graph: fx.Graph) -> list[tuple[Match, dict[str, Any]]]:
    miss = nearest_miss(pattern, graph)
    return [] if miss is None else [(Match(miss[0], {}), {LACKS: miss[1]})]


def _in_blocks(
    sites: Iterable[Placed], find: Callable[[fx.Graph], list[tuple[Match, dict[str, Any]]]]
) -> list[Placed]:
    """What is found in the graph of each program, as sites in every block that has it."""
    found: dict[Any, list[Site]] = {}
    placed = []
    frames = {(site.block, site.program): site for site in sites}
    for (block, program), neighbour in frames.items():
        if program not in found:
            alike = [path for path, other in frames if other is program]
            matches = find(program.graph)
            found[program] = [_pattern_site(match, facts, alike) for match, facts in matches]
        placed += [
            Placed(site, block, program, neighbour.layer, program.kind) for site in found[program]
        ]
    return placed


def _pattern_site(match: Match, facts: Mapping[str, Any], blocks: Sequence[str]) -> Site:
    """The site of one match. Its module is where the root was computed, relative to its block.

    The graph remembers the path in the block it was traced in, which is one of ``blocks``.
    """
    paths = [path for _, path in stack_paths(match.root)]
    module = paths[-1] if paths else ""
    for block in blocks:
        if block and is_within(module, block):
            module = module[len(block) + 1 :]
            break
    nodes = {name: node for name, node in match.bindings.items() if isinstance(node, fx.Node)}
    return Site("pattern", module, None, None, nodes, facts, turned=match.turned)
