"""Row-wise rewriting: each row of a batch uses its own adapter.

    y   ->   where(rows == number of the adapter, what its rule makes of y, y)

``rows`` is an input of the rewritten programs, [batch], one whole number for each row; the masks
are made from it in every block, so that a block that is computed again (gradient checkpointing)
makes them again. Adapters that do alike at a site are computed together, each row with its own
(:mod:`.grouped_rows`); all others one after the other, for all rows. Where the value that changes
has no batch axis (a weight, a table of positions), what is made of it is computed twice, up to the
first values that have one, and chosen there.
"""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import fx

from peftsurgery.anatomy.values import shape
from peftsurgery.capture import Program
from peftsurgery.capture.module_calls import take_place
from peftsurgery.capture.names import join
from peftsurgery.errors import SurgeryError
from peftsurgery.language.readings import rewrite, shape_of
from peftsurgery.surgery.plan.cut import Cut, copy_name
from peftsurgery.surgery.rewrite.batch_axis import Axis, Batch, expression
from peftsurgery.surgery.rewrite.environment import environment
from peftsurgery.surgery.rewrite.grouped_rows import (
    RowGroup,
    UngroupableError,
    batch_back,
    like_on_meta,
)
from peftsurgery.surgery.rewrite.program import (
    Inserted,
    ProxyDomain,
    Replacement,
    Values,
    Walk,
    finished,
)

ATEN = torch.ops.aten


@dataclass(frozen=True)
class RowChoice:
    """Row choice of one program: the adapters, and the position of the batch."""

    adapters: tuple[str, ...]
    batch: Batch | None
    is_top: bool


class RowWalk(Walk):
    """A walk on which every adapter has values of its own, up to where rows can be told apart.

    What is computed of one of them is computed twice; at the first value that has a batch axis, its
    rows are chosen, and all adapters go on from there.
    """

    def __init__(self, program: Program, choice: RowChoice) -> None:
        super().__init__(program)
        self.batch, self.adapters = choice.batch or Batch(None), choice.adapters
        self.own: dict[str, Values] = {}
        self.makers: dict[fx.Node, Cut] = {}
        self.masks: dict[str, fx.Node] = {}
        self.cuts: list[Cut] = []
        self.grouped: set[Cut] = set()
        self.known_places: dict[tuple[str, ...], tuple[fx.Node, fx.Node]] = {}

    def begin(self) -> None:
        """Take the rows' numbers, after the other inputs, and make a mask (batch,) of each."""
        super().begin()
        self.rows = rows = self.graph.placeholder("rows")
        for adapter in self.own:
            number = self.adapters.index(adapter)
            mask = self.graph.call_function(ATEN.eq.Scalar, (rows, number))
            mask.meta["surgery"] = adapter
            self.masks[adapter] = mask

    def values_of(self, cut: Cut) -> Values:
        """The values of the cut's adapter: its own, and those that all share."""
        shared = self.values
        mine = Values(ChainMap({}, shared.everywhere), ChainMap({}, shared.there))
        return self.own.setdefault(cut.operation.name, mine)

    def plan(self, cut: Cut) -> None:
        """Say where a cut's values are made, first its adapter's own copy of a parameter.

        PSG313 if it is not known which rows are one adapter's.
        """
        if self.batch.size is None:
            where = cut.placed.block or "the model"
            message = f"no axis of what {where} is given is known to be the batch"
            hint = "call the model for the rows of each adapter alone"
            raise SurgeryError("PSG313", message, hint)
        self.cuts.append(cut)
        values, node = self.values_of(cut), self.first.get(cut.site.parameter)
        if cut.rule.train and node is not None:
            copy = partial(self.own_copy, cut, node, values)
            self.after.setdefault(node, []).insert(0, copy)
        super().plan(cut)

    def own_copy(self, cut: Cut, node: fx.Node, values: Values) -> None:
        """Read an adapter's own copy of a parameter for its rows."""
        home = copy_name(str(node.target), cut.operation.name)
        new = Inserted(self.graph, cut.operation.name, node).create_node("get_attr", home, (), {})
        new.meta["val"] = node.meta["val"]
        self.makers[new], values.everywhere[node] = cut, new

    def make(self, change: Replacement, is_last: bool) -> None:
        """Make a cut's new value, with those of the adapters that do alike there."""
        if change.cut in self.grouped:
            return  # made with the first of those that do alike
        alike = self.alike(change)
        if len(alike) < 2 or not self.make_together(change, alike):
            super().make(change, is_last)

    def alike(self, change: Replacement) -> list[Cut]:
        """Cuts of a site, the given one first, that differ in their adapters alone.

        None if an adapter does more there, of which this is a part.
        """
        first, here = change.cut, [cut for cut in self.cuts if self.meets(cut, change)]
        names = Counter(cut.operation.name for cut in here)
        is_alone = len(first.rule.rewrite) == 1 and not (first.over or first.rule.train)
        alike = [
            cut
            for cut in here
            if cut.rule == first.rule and cut.numbers == first.numbers and not cut.over
            if cut.site.slice == first.site.slice and cut.site.nodes == first.site.nodes
        ]
        return alike if is_alone and all(names[c.operation.name] == 1 for c in alike) else []

    def meets(self, cut: Cut, change: Replacement) -> bool:
        """Whether a cut is at a change's site, or reads or changes the value that it changes.

        Slices of one value are apart.
        """
        mine, other = change.cut.site.slice, cut.site.slice
        nodes = [self.merged(node) for node in cut.site.nodes.values()]
        is_apart = None not in (mine, other) and mine != other
        return not is_apart and (change.node in nodes or cut.site is change.cut.site)

    def make_together(self, change: Replacement, alike: Sequence[Cut]) -> bool:
        """Make the new value of the rows of several adapters at once; False if that cannot be."""
        axis, old = self.batch.axis(change.node), self.values.read(change.node, change.origin)
        its_own = [self.values_of(cut).read(change.node, change.origin) for cut in alike]
        if axis is None or self.batch.size == 1 or any(value is not old for value in its_own):
            return False
        made, inserted = list[fx.Node](), list[list[fx.Node]]()
        for cut in alike:
            before = next(iter(reversed(self.graph.nodes)))
            made.append(self.new_value(replace(change, cut=cut), old))
            inserted.append(inserted_after(before))
        mask, index = self.places(tuple(cut.operation.name for cut in alike))
        tracer = Inserted(self.graph, "rows", change.origin)
        try:
            group = RowGroup(tracer, index, self.known_axis, partial(sample, alike[0]))
            value = group.of(inserted, made[0])
        except UngroupableError:
            return False
        taken = batch_back(fx.Proxy(value, tracer), axis).node
        super().put(change, old, self.choose(mask, tracer, axis, change.node, taken, old))
        self.grouped.update(alike)
        return True

    def new_value(self, change: Replacement, old: fx.Node) -> fx.Node:
        """Append what a cut makes of ``old``, for all rows."""
        domain = ProxyDomain(self, change.cut, {change.node: old}, change.origin)
        names = environment(change.cut, domain)
        value = rewrite(change.cut.rule, names, domain.context(change.cut))[change.name]
        return finished(change, value, domain)

    def known_axis(self, node: fx.Node) -> Axis | None:
        """Batch axis of a value; None if it has no batch. Raises `UngroupableError` if unsure."""
        if "val" not in node.meta:
            raise UngroupableError
        axis = self.batch.axis(node)
        if axis is None and any(expression(size).has(self.batch.size) for size in shape(node)):
            raise UngroupableError
        return axis

    def places(self, adapters: tuple[str, ...]) -> tuple[fx.Node, fx.Node]:
        """The rows that have one of these adapters (a mask), and its position among them.

        Both are (batch,); the position is 0 in all other rows.
        """
        if adapters not in self.known_places:
            tracer = Inserted(self.graph, "rows", self.rows)
            table = [-1, *(adapters.index(a) if a in adapters else -1 for a in self.adapters)]
            made = tracer.create_node("call_function", torch.tensor, (table,), {})
            rows: Any = fx.Proxy(self.rows, tracer)
            here = ATEN.to.other(fx.Proxy(made, tracer), rows)  # where the model is
            found = ATEN.index_select.default(here, 0, ATEN.add.Tensor(rows, 1))
            mask, index = ATEN.ge.Scalar(found, 0), ATEN.clamp_min.default(found, 0)
            self.known_places[adapters] = mask.node, index.node
        return self.known_places[adapters]

    def put(self, change: Replacement, old: fx.Node, new: fx.Node) -> None:
        """Give a new value to the adapter alone, or to its rows where they can be told apart."""
        axis = self.batch.axis(change.node)
        if axis is None:
            self.makers[new] = change.cut
            self.values_of(change.cut).put(change.node, change.readers, new)
        else:
            chosen = self.choose(
                *self.rows_of(change.cut, change.node), axis, change.node, new, old
            )
            super().put(change, old, chosen)

    def copied(self, node: fx.Node) -> fx.Node:
        """A copy of a node, with what each adapter's own values make of it in that one's rows."""
        chosen = super().copied(node)
        for values in self.own.values():
            read = [values.read(self.merged(source), node) for source in node.all_input_nodes]
            cut = next((self.makers[new] for new in read if new in self.makers), None)
            if cut is None:
                continue
            if node.op != "call_function":
                raise SurgeryError(
                    "PSG313",
                    f"{cut.operation.name} at {cut.placed.module} changes what all rows share, and "
                    "it leaves the block before it meets the batch",
                    "call the model for the rows of this adapter alone",
                )
            twin = self.copy(node, values)
            twin.meta["surgery"] = cut.operation.name
            axis = self.batch.axis(node)
            if axis is None:
                values.everywhere[node], self.makers[twin] = twin, cut
            else:
                old = chosen
                chosen = self.choose(*self.rows_of(cut, node), axis, node, twin, old)
                take_place(old, chosen)
        return chosen

    def rows_of(self, cut: Cut, node: fx.Node) -> tuple[fx.Node, Inserted]:
        """The mask of the rows of a cut's adapter, and what makes its nodes beside ``node``."""
        adapter = cut.operation.name
        return self.masks[adapter], Inserted(self.graph, adapter, node)

    def choose(
        self,
        rows: fx.Node,
        tracer: Inserted,
        axis: Axis,
        node: fx.Node,
        new: fx.Node,
        old: fx.Node,
    ) -> fx.Node:
        """Select by row: the new value for ``rows``, a mask (batch,), the old one elsewhere."""
        mask, taken, other = (fx.Proxy(each, tracer) for each in (rows, new, old))
        if axis.together is not None:
            times = ATEN.sym_size.int(other, 0) // ATEN.sym_size.int(mask, 0)
            flat, wide = ((-1, 1), (-1, times)) if axis.together else ((1, -1), (times, -1))
            each = ATEN.expand.default(ATEN.view.default(mask, flat), wide)
            mask = ATEN.reshape.default(each, (-1,))
        shape = tuple(-1 if dim == axis.dim else 1 for dim in range(node.meta["val"].dim()))
        chosen = ATEN.where.self(ATEN.view.default(mask, shape), taken, other).node
        chosen.meta["val"] = node.meta.get("val")
        return chosen


def inserted_after(before: fx.Node) -> list[fx.Node]:
    """The nodes that rules inserted into a graph after one of its nodes, in order."""
    new = takewhile(lambda node: node is not before, reversed(before.graph.nodes))
    return [node for node in new if "surgery" in node.meta][::-1]


def sample(cut: Cut, node: fx.Node) -> Any:
    """A tensor on meta like a parameter of a cut, or like a value around it; flags are False."""
    if "val" in node.meta:
        return like_on_meta(node.meta["val"])
    params = {join(cut.holder, name): param for name, param in cut.rule.params.items()}
    if node.target not in params:
        return False
    param = params[str(node.target)]
    dtype: torch.dtype = getattr(torch, param.dtype)
    return torch.empty(shape_of(param, cut.rule, cut.numbers), dtype=dtype, device="meta")


def check_lengths(cuts: Iterable[Cut]) -> None:
    """Refuse cuts that make the inputs longer, which all rows of a batch would share. PSG313."""
    for cut in cuts:
        if cut.rule.kind.is_inputs:
            message = f"{cut.operation.name} changes the length of the text, and all rows have one"
            hint = "call the model for the rows of this adapter alone"
            raise SurgeryError("PSG313", message, hint)


def pass_rows(call: fx.Node) -> None:
    """Pass the rows' adapter numbers on to a called block."""
    call.args = (*call.args, call.graph.find_nodes(op="placeholder")[-1])
