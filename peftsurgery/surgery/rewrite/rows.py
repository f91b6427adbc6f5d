"""Row-wise rewriting: each row of a batch uses its own adapter.

    y   ->   where(rows == number of the adapter, what its rule makes of y, y)

``rows`` is an input of the rewritten programs, [batch], one whole number for each row; the masks
are made from it in every block, so that a block that is computed again (gradient checkpointing)
makes them again. Where the value that changes has no batch axis (a weight, a table of positions),
what is made of it is computed twice, up to the first values that have one, and chosen there.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from peftsurgery.capture import Program
from peftsurgery.capture.module_calls import take_place
from peftsurgery.errors import SurgeryError
from peftsurgery.surgery.plan.cut import Cut, copy_name
from peftsurgery.surgery.rewrite.batch_axis import Axis, Batch
from peftsurgery.surgery.rewrite.program import Inserted, Replacement, Values, Walk

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

    def begin(self) -> None:
        """Take the rows' numbers, after the other inputs, and make a mask (batch,) of each."""
        super().begin()
        rows = self.graph.placeholder("rows")
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

    def put(self, change: Replacement, old: fx.Node, new: fx.Node) -> None:
        """Give a new value to the adapter alone, or to its rows where they can be told apart."""
        axis = self.batch.axis(change.node)
        if axis is None:
            self.makers[new] = change.cut
            self.values_of(change.cut).put(change.node, change.readers, new)
        else:
            super().put(change, old, self.choose(change.cut, axis, change.node, new, old))

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
                old, chosen = chosen, self.choose(cut, axis, node, twin, chosen)
                take_place(old, chosen)
        return chosen

    def choose(self, cut: Cut, axis: Axis, node: fx.Node, new: fx.Node, old: fx.Node) -> fx.Node:
        """Select by row: the new value for the adapter's rows, the old one elsewhere."""
        tracer = Inserted(self.graph, cut.operation.name, node)
        adapter = self.masks[cut.operation.name]
        mask, taken, other = (fx.Proxy(each, tracer) for each in (adapter, new, old))
        if axis.together is not None:
            times = ATEN.sym_size.int(other, 0) // ATEN.sym_size.int(mask, 0)
            flat, wide = ((-1, 1), (-1, times)) if axis.together else ((1, -1), (times, -1))
            each = ATEN.expand.default(ATEN.view.default(mask, flat), wide)
            mask = ATEN.reshape.default(each, (-1,))
        shape = tuple(-1 if dim == axis.dim else 1 for dim in range(node.meta["val"].dim()))
        chosen = ATEN.where.self(ATEN.view.default(mask, shape), taken, other).node
        chosen.meta["val"] = node.meta.get("val")
        return chosen


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
