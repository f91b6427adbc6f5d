"""Row-wise rewriting: each row of a batch uses its own adapter.

    y   ->   where(rows == number of the adapter, what its rule makes of y, y)

``rows`` is an input of the rewritten programs, [batch], one whole number for each row; the masks
are made from it in every block, so that a block that is computed again (gradient checkpointing)
makes them again. Where the value that changes has no batch axis (a weight, a table of positions),
what is made of it is computed twice, up to the first values that have one, and chosen there.
"""

from __future__ import annotations

import operator
from collections import ChainMap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from peftsurgery.capture import Program
from peftsurgery.capture.stack import inherit
from peftsurgery.errors import SurgeryError
from peftsurgery.surgery.plan.cut import Cut, copy_name, in_order
from peftsurgery.surgery.rewrite.batch_axis import Axis, Batch
from peftsurgery.surgery.rewrite.program import Rewriter

ATEN = torch.ops.aten


@dataclass(frozen=True)
class RowChoice:
    """Row choice of one program: the adapters, and the position of the batch."""

    adapters: tuple[str, ...]
    batch: Batch | None
    is_top: bool


class RowRewriter(Rewriter):
    """Inserts cuts so that each changes only the rows of its own adapter."""

    def __init__(self, program: Program, choice: RowChoice) -> None:
        super().__init__(program)
        self.batch, self.adapters = choice.batch or Batch(None), choice.adapters
        with self.graph.inserting_before(_after_inputs(self.graph)):
            self.rows = self.graph.placeholder("rows")
        self.masks_of_rows: dict[str, fx.Node] = {}
        # What one adapter's cuts leave for its later ones is not for another adapter's.
        self.chosen: dict[fx.Node, fx.Node] = {}
        self.left: dict[str, tuple[dict[Any, Any], ...]] = {}

    def sew(self, cut: Cut) -> None:
        """Insert one cut, for the rows of its adapter."""
        mine = self.left.setdefault(cut.operation.name, ({}, {}, {}, {}, {}))
        latest, self.weights, self.owned, self.masks, self.taken = mine
        self.latest = ChainMap(latest, self.chosen)
        if cut.rule.train and cut.site.parameter is not None:
            self.own(cut, cut.site.parameter)
        super().sew(cut)

    def own(self, cut: Cut, parameter: str) -> None:
        """Make the rows of the cut's adapter read its own copy of a parameter."""
        self.owned[parameter] = home = copy_name(parameter, cut.operation.name)
        for node in self.graph.find_nodes(op="get_attr", target=parameter):
            with self.graph.inserting_before(node.next):
                copied = self.graph.create_node("get_attr", home)
            copied.meta = {**node.meta, "surgery": cut.operation.name}
            self.latest[node] = copied
            self.spread(cut, node, copied, list(node.users))

    def stored(self, cut: Cut, name: str) -> fx.Proxy:
        """A weight as the model stores it, or the adapter's own copy of it."""
        proxy = super().stored(cut, name)
        proxy.node.target = self.owned.get(proxy.node.target, proxy.node.target)
        return proxy

    def use(
        self,
        cut: Cut,
        name: str,
        old: fx.Node,
        new: fx.Node,
        users: Sequence[fx.Node],
        is_everywhere: bool,
    ) -> None:
        """Make the rows of the cut's adapter read the new value, others the old one."""
        original = cut.site.nodes[name]
        axis = self.batch.axis(original)
        if axis is None:
            self.spread(cut, old, new, users)
            if is_everywhere:
                self.latest[self.copies[original]] = new
            return
        chosen = self.choose(cut, axis, new, old, new.next)
        chosen.meta["val"] = original.meta.get("val")
        super().use(cut, name, old, chosen, users, is_everywhere)
        if is_everywhere:
            self.chosen[self.copies[original]] = self.latest.pop(self.copies[original])

    def spread(self, cut: Cut, old: fx.Node, new: fx.Node, users: Iterable[fx.Node]) -> None:
        """Duplicate the computation for the new value, up to where rows can be told apart."""
        twins, first = {old: new}, set(users)
        for node in list(self.graph.nodes):
            if node not in first and not any(
                n in twins for n in node.all_input_nodes if n is not old
            ):
                continue
            if node.op != "call_function":
                raise SurgeryError(
                    "PSG313",
                    f"{cut.operation.name} at {cut.placed.module} changes what all rows share, and "
                    "it leaves the block before it meets the batch",
                    "call the model for the rows of this adapter alone",
                )
            with self.graph.inserting_before(node.next):
                twin = self.graph.node_copy(node, lambda source: twins.get(source, source))
            twin.meta = {**node.meta, "surgery": cut.operation.name}
            axis = self.batch.axis(node)
            if axis is None:
                twins[node] = twin
                continue
            after = [user for user in node.users if user is not twin]
            chosen = self.choose(cut, axis, twin, node, twin.next)
            chosen.meta = {**node.meta, "surgery": cut.operation.name}
            for user in after:
                user.replace_input_with(node, chosen)
            # an earlier choice is a user of the node, and is made after this one
            self.chosen.setdefault(node, chosen)

    def choose(self, cut: Cut, axis: Axis, new: fx.Node, old: fx.Node, point: fx.Node) -> fx.Node:
        """Select by row: the new value for the adapter's rows, the old one elsewhere."""
        before = set(self.graph.nodes)
        mask = self.mask(cut.operation.name)
        dims = len(old.meta["val"].shape)
        with self.graph.inserting_before(point):
            call = self.graph.call_function
            if axis.together is not None:
                long, short = (call(ATEN.sym_size.int, (n, 0)) for n in (old, mask))
                times = call(operator.floordiv, (long, short))
                flat, wide = ((-1, 1), (-1, times)) if axis.together else ((1, -1), (times, -1))
                mask = call(ATEN.view.default, (mask, flat))
                mask = call(ATEN.reshape.default, (call(ATEN.expand.default, (mask, wide)), (-1,)))
            shape = tuple(-1 if dim == axis.dim else 1 for dim in range(dims))
            mask = call(ATEN.view.default, (mask, shape))
            chosen = call(ATEN.where.self, (mask, new, old))
        for node in self.graph.nodes:
            if node not in before:
                inherit(node, old)
                node.meta["surgery"] = cut.operation.name
        return chosen

    def mask(self, adapter: str) -> fx.Node:
        """Boolean mask (batch,) of the rows that use an adapter, made once in a program."""
        if adapter not in self.masks_of_rows:
            number = self.adapters.index(adapter)
            with self.graph.inserting_before(_after_inputs(self.graph)):
                mask = self.graph.call_function(ATEN.eq.Scalar, (self.rows, number))
            mask.meta["surgery"] = adapter
            self.masks_of_rows[adapter] = mask
        return self.masks_of_rows[adapter]


def check_lengths(cuts: Iterable[Cut]) -> None:
    """Refuse cuts that make the inputs longer, which all rows of a batch would share. PSG313."""
    for cut in cuts:
        if cut.rule.kind.resizes:
            raise SurgeryError(
                "PSG313",
                f"{cut.operation.name} changes the length of the text, and all rows have one",
                "call the model for the rows of this adapter alone",
            )


def row_graph(program: Program, cuts: Sequence[Cut], choice: RowChoice) -> fx.Graph:
    """Rewrite a program's graph row by row: one more input, each row's adapter number.

    PSG313 if the rows cannot be told apart where an adapter changes something.
    """
    if choice.batch is None and cuts:
        where = cuts[0].placed.block or "the model"
        raise SurgeryError(
            "PSG313",
            f"no axis of what {where} is given is known to be the batch",
            "call the model for the rows of each adapter alone",
        )
    rewriter = RowRewriter(program, choice)
    for cut in in_order(sorted(cuts, key=lambda cut: not cut.rule.train)):
        rewriter.sew(cut)
    rewriter.drop_unused()
    return rewriter.graph


def pass_rows(call: fx.Node) -> None:
    """Pass the rows' adapter numbers on to a called block."""
    call.args = (*call.args, call.graph.find_nodes(op="placeholder")[-1])


def _after_inputs(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.op != "placeholder")
