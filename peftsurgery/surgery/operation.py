"""Operations and cuts: what is done to a model, and where.

An :class:`Operation` is a rule file with its settings under an adapter's name. A :class:`Cut` is
one of its rules at one site of one model. An operated model is a captured one and an ordered list
of operations; everything else about it follows from these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..anatomy import Placed, Survey, survey
from ..anatomy.site import Site, join
from ..capture import Capture
from ..capture.stack import stack_paths
from ..errors import SurgeryError
from ..language import Rule, RuleFile, Selection, select
from ..language.kinds import sizes_of
from ..language.pattern import find_pattern


@dataclass(frozen=True, eq=False)
class Operation:
    """A rule file, its settings (resolved), and the name its parameters get."""

    file: RuleFile
    settings: Mapping[str, Any]
    name: str

    def __deepcopy__(self, memo: dict[int, Any]) -> Operation:
        return self  # immutable: copies of a model share their operations


@dataclass(frozen=True, eq=False)
class Cut:
    """One rule of an operation at one site."""

    operation: Operation
    rule: Rule
    placed: Placed

    def __deepcopy__(self, memo: dict[int, Any]) -> Cut:
        return self  # immutable, and its site's nodes are those of a program that is shared

    @property
    def site(self) -> Site:
        """The site in its program, shared by all blocks of one shape class."""
        return self.placed.site

    @property
    def place(self) -> str:
        """The path, relative to the block, beneath which the cut's parameters live.

        Beneath the site's module and the adapter's name. A further part tells the sites of one
        module apart: the slice of a fused weight, a weight that is not called by its module's name
        alone, the sublayer that a residual addition ends.
        """
        path = join(self.site.module, self.operation.name)
        leaf = (self.site.parameter or "").rpartition(".")[2]
        if self.site.slice is not None:
            return join(path, str(self.site.label))
        if leaf not in ("", "weight") and not self.rule.train:
            return join(path, leaf)
        if self.site.kind == "residual":
            return join(path, str(self.placed.facts.get("after", "")))
        return path

    @property
    def parameters(self) -> dict[str, str]:
        """The absolute names of the parameters the cut adds, by the rule's names for them.

        One that all sites share is known by the adapter's name alone.
        """
        path = join(self.placed.block, self.place)
        return {
            name: join(self.operation.name if param.shared else path, name)
            for name, param in self.rule.params.items()
        }

    @property
    def weights(self) -> dict[str, str]:
        """The absolute names of the weights the site binds, by the rule's names for them."""
        return {
            name: join(self.placed.block, str(node.target))
            for name, node in self.site.nodes.items()
            if node.op == "get_attr"
        }

    @property
    def sizes(self) -> dict[str, Any]:
        """The sizes that the site binds."""
        return sizes_of(self.rule.kind, self.placed.facts)

    @property
    def numbers(self) -> dict[str, Any]:
        """The sizes and settings that the rule's expressions may read."""
        return {**self.operation.settings, **self.sizes}


def select_cuts(
    capture: Capture, operation: Operation, before: Iterable[Cut] = ()
) -> tuple[list[Cut], list[Selection]]:
    """Where an operation cuts in a capture, and the selections that say so.

    ``before`` are the cuts of the operations that come first; the rules of a file know each other's
    too.
    """
    earlier = list(before)
    sites = survey(capture)
    cuts: list[Cut] = []
    selections: list[Selection] = []
    for number, rule in enumerate(operation.file.rules):
        name = (
            f"{operation.name}.rules[{number}]" if len(operation.file.rules) > 1 else operation.name
        )
        candidates = [*sites, *pattern_sites(sites, rule)] if rule.pattern else sites
        matched = _modules([*earlier, *cuts])
        chosen = select(candidates, rule, operation.settings, operation.file.roles, name, matched)
        selections.append(chosen)
        cuts += [Cut(operation, rule, placed) for placed in _placed(chosen.kept)]
    return cuts, selections


def _modules(cuts: Iterable[Cut]) -> dict[str, frozenset[str]]:
    """The modules that were cut, by the adapter's name and by the rule file's."""
    found: dict[str, set[str]] = {}
    for cut in cuts:
        for name in (cut.operation.name, cut.operation.file.name):
            found.setdefault(name, set()).add(cut.placed.module)
    return {name: frozenset(modules) for name, modules in found.items()}


def _placed(sites: Iterable[Any]) -> list[Placed]:
    return [site for site in sites if isinstance(site, Placed)]


def pattern_sites(sites: Survey, rule: Rule) -> list[Placed]:
    """A site for every occurrence of the rule's pattern, in every block."""
    assert rule.pattern is not None
    found: dict[Any, list[Site]] = {}
    placed = []
    frames = {(site.block, site.program): site for site in sites}
    for (block, program), neighbour in frames.items():
        if program not in found:
            alike = [path for path, other in frames if other is program]
            found[program] = [
                _pattern_site(match.root, match.bindings, alike)
                for match in find_pattern(rule.pattern, program.graph)
            ]
        placed += [
            Placed(site, block, program, neighbour.layer, program.kind) for site in found[program]
        ]
    return placed


def _pattern_site(root: fx.Node, bindings: Mapping[str, Any], blocks: Sequence[str]) -> Site:
    """The site of one match. Its module is where the root was computed, relative to its block.

    The graph remembers the path in the block it was traced in, which is one of ``blocks``.
    """
    paths = [path for _, path in stack_paths(root)]
    module = paths[-1] if paths else ""
    for block in blocks:
        if block and (module == block or module.startswith(f"{block}.")):
            module = module[len(block) + 1 :]
            break
    nodes = {name: node for name, node in bindings.items() if isinstance(node, fx.Node)}
    return Site("pattern", module, None, None, nodes, {})


def check_free(cuts: Iterable[Cut], taken: Iterable[str]) -> None:
    """Refuse two cuts that would share a parameter without sharing a weight. PSG304."""
    owners: dict[str, Cut] = {}
    occupied = set(taken)
    for cut in cuts:
        for short, name in cut.parameters.items():
            other = owners.get(name)
            common = cut.rule.params[short].shared
            shared = other is not None and (common or _same_weight(cut, other))
            if name in occupied or (other is not None and not shared):
                raise SurgeryError(
                    "PSG304",
                    f"'{name}' is there already",
                    "apply under another name: apply(..., name='second')",
                )
            owners[name] = cut


def _same_weight(cut: Cut, other: Cut) -> bool:
    """Whether two cuts are one weight used twice (a layer that is called several times)."""
    return cut.rule is other.rule and cut.placed.parameter == other.placed.parameter is not None
