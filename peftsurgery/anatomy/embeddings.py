"""Embedding sites y = W[x], ids x, W (entries, width), with the role of each table.

That is told by what the ids are made of, and never by how long the captured text was:

    counted      an arange, a cumulative sum              positions
    held         a buffer of the model                    positions if the table has a row for each
                                                          of its entries, and they are not picked by
                                                          positions themselves; else types
    constant     zeros, say                               types
    given        an input of the model                    tokens, or what is added to them
    computed     from an input by arithmetic              tokens, if it is as long as their table

Of the given ids whose embeddings are added up, tokens are those of the table that is also the head,
or that has most entries. The others are types if the model gets its positions elsewhere; where it
does not, they may be either, and have no role. Where transformers has a name for the argument, the
name is taken at its word.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import fx

from peftsurgery.anatomy.flow import Flow, forward
from peftsurgery.anatomy.model_arguments import ARGUMENTS, TOKENS
from peftsurgery.anatomy.ops import Trait, has
from peftsurgery.anatomy.site import Site
from peftsurgery.anatomy.values import backward, is_tensor, operands, parameter_of, shape
from peftsurgery.anatomy.written_memory import made_of
from peftsurgery.capture.schemas import op

KEEPS_IDS = Trait.LAYOUT | Trait.ADDITION | Trait.PICK | Trait.FILL
NAMED = {
    **dict.fromkeys(TOKENS, "embed.tokens"),
    ARGUMENTS["positions"]: "embed.positions",
    ARGUMENTS["decoder_positions"]: "embed.positions",
    ARGUMENTS["types"]: "embed.types",
}


def find_embeddings(flow: Flow) -> list[Site]:
    """The embedding sites of a program, with their roles as far as it shows them."""
    tables = []
    for node in flow.nodes:
        if op(node) == "embedding":
            weight, _ = parameter_of(node.args[0])
            ids = node.args[1]
            if weight is not None and isinstance(ids, fx.Node):
                tables.append(_Table(_site(node, weight, ids), given_ids(ids)))
    roles = _own_roles(tables)
    unknown = [t for t in tables if t.given is not None and t not in roles]
    roles |= _given_roles(flow, unknown, roles)
    return [replace(table.site, role=_role(table, roles)) for table in tables]


@dataclass(frozen=True, eq=False)
class _Table:
    """An embedding, and the input that its ids are, if they are one."""

    site: Site
    given: fx.Node | None

    @property
    def ids(self) -> fx.Node:
        return self.site.nodes["x"]

    @property
    def entries(self) -> int:
        return int(self.site.facts["in"])


def _site(node: fx.Node, weight: fx.Node, ids: fx.Node) -> Site:
    entries, width = (int(size) for size in shape(weight))
    name = str(weight.target)
    facts = {"in": entries, "out": width, "op": "embedding", "dtype": weight.meta["val"].dtype}
    nodes = {"x": ids, "W": weight, "y": node}
    return Site("embedding", name.rpartition(".")[0], None, name, nodes, facts)


Roles = dict[_Table, str | None]


def _own_roles(tables: Sequence[_Table]) -> Roles:
    """The roles of tables whose ids the model makes itself, or that a known argument holds."""
    roles: Roles = {}
    for table in tables:
        inputs = [table.given] if table.given is not None else _inputs(table.ids)
        named = {NAMED[node.name] for node in inputs if node.name in NAMED}
        if table.given is not None:
            if named:
                roles[table] = named.pop()
        elif is_counted(table.ids) or "embed.positions" in named:
            roles[table] = "embed.positions"
        elif not inputs:
            is_place = is_held(table.ids) and _has_row_for_each(table)
            roles[table] = "embed.positions" if is_place else "embed.types"
    placed = [table for table, role in roles.items() if role == "embed.positions"]
    for table in placed:
        others = {n for other in placed if other is not table for n in made_of(other.ids)}
        if others & {n for index in _picked_by(table.ids) for n in made_of(index)}:
            roles[table] = "embed.types"
    return roles


def _inputs(ids: fx.Node) -> list[fx.Node]:
    """The inputs whose contents ids are computed from; not those whose size they have."""
    return [found for found in made_of(ids) if found.op == "placeholder"]


def _has_row_for_each(table: _Table) -> bool:
    """Whether a table has as many rows as the id buffer has entries, as position tables have."""
    held = [found for found in made_of(table.ids) if found.op == "get_attr"]
    return all(table.entries >= max(map(int, shape(found)), default=1) for found in held)


def _picked_by(ids: fx.Node) -> Iterable[fx.Node]:
    """Index values by which ids are picked out of another value."""
    for found in made_of(ids):
        if has(found, Trait.PICK):
            yield from operands(found)[1:]


def _given_roles(flow: Flow, tables: Sequence[_Table], known: Roles) -> Roles:
    """The roles of tables whose ids the model is given, by the sums that they are part of."""
    roles: Roles = {}
    is_placed = "embed.positions" in known.values() or any(has(n, Trait.WAVE) for n in flow.nodes)
    heads = {str(linear.parameter) for linear in flow.linears}
    sizes = {int(linear.facts["out"]) for linear in flow.linears}

    def likeness(table: _Table) -> tuple[bool, bool, int, int]:
        """Sort key: how likely a table is the token table; coordinate ids have one more axis."""
        return table.site.parameter in heads, table.entries in sizes, -_rank(table), table.entries

    for group in _sums([*tables, *known]):
        mine = [table for table in group if table in tables]
        if not mine:
            continue
        tokens = [table for table in group if known.get(table) == "embed.tokens"]
        tokens = tokens or [max(mine, key=likeness)]
        for table in mine:
            if table in tokens or table.entries in {t.entries for t in tokens}:
                roles[table] = "embed.tokens"
            else:
                is_beside = is_placed and _rank(table) == _rank(tokens[0])
                roles[table] = "embed.types" if is_beside else None
    return roles


def _rank(table: _Table) -> int:
    return len(shape(table.given if table.given is not None else table.ids))


def _role(table: _Table, roles: Roles) -> str | None:
    """The role of a table: of those with computed ids, a table as long as one of tokens is one."""
    tokens = [other for other, role in roles.items() if role == "embed.tokens"]
    if table.site.parameter in {other.site.parameter for other in tokens}:
        return "embed.tokens"
    is_alike = table not in roles and table.entries in {other.entries for other in tokens}
    return "embed.tokens" if is_alike else roles.get(table)


def _sums(tables: Sequence[_Table]) -> list[list[_Table]]:
    """The tables, those that are added up together."""
    groups: list[tuple[set[fx.Node], list[_Table]]] = []
    for table in tables:
        # what is made of the embedding by scaling and adding alone
        ways = set(forward([table.site.nodes["y"]], Trait.LAYOUT | Trait.SCALING | Trait.ADDITION))
        members = [table]
        for group in [group for group in groups if group[0] & ways]:
            groups.remove(group)
            ways |= group[0]
            members = [*group[1], *members]
        groups.append((ways, members))
    return [members for _, members in groups]


def is_counted(node: fx.Node) -> bool:
    """Whether ids are computed from an arange or cumulative sum, rather than picked by one."""
    return any(has(found, Trait.COUNT | Trait.SCAN) for found in made_of(node))


def is_held(node: fx.Node) -> bool:
    """Whether a value is a stored tensor, at most viewed or indexed."""
    ends = [n for n in backward([node]) if not operands(n)]
    return bool(ends) and all(n.op == "get_attr" for n in ends)


def given_ids(node: fx.Node) -> fx.Node | None:
    """The model input behind ids, through views, shifts, fills and indexing."""
    for found in made_of(node, lambda n: has(n, KEEPS_IDS)):
        if found.op == "placeholder" and is_tensor(found):
            return found
    return None
