"""Cuts at the model's inputs: new ones between the embedding and all else, new outputs last.

They are made in a front (:mod:`peftsurgery.capture.fronts`), so every size behind them is that of
the longer sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from peftsurgery.anatomy.model_arguments import ARGUMENTS
from peftsurgery.capture import Capture
from peftsurgery.capture.module_calls import GIVEN, take_place
from peftsurgery.capture.signature import Call
from peftsurgery.errors import SurgeryError
from peftsurgery.language.readings import rewrite
from peftsurgery.language.schema import Rule
from peftsurgery.reach import reach
from peftsurgery.surgery.plan.cut import Cut
from peftsurgery.surgery.rewrite.dtypes import cast, compute_dtype, dtype_of
from peftsurgery.surgery.rewrite.environment import FakeDomain, environment
from peftsurgery.surgery.rewrite.program import ProxyDomain, Walk

Find = Callable[[Call], Capture]


def changes_inputs(cut: Cut) -> bool:
    """Whether a cut is at the model's inputs and may change their sizes."""
    return cut.rule.kind.is_inputs


def new_shapes(cuts: Iterable[Cut]) -> dict[str, tuple[Any, ...]]:
    """The shapes of the model's inputs after these cuts, by the names of its arguments."""
    values: dict[str, Any] = {}
    for cut in cuts:
        if changes_inputs(cut):
            values |= fake_inputs(cut, values)
    return {ARGUMENTS[name]: tuple(value.shape) for name, value in values.items()}


def fake_inputs(cut: Cut, known: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that a cut changes, as fake tensors; ``known`` are those that others changed.

    PSG305 if the inputs lack one that is not optional, PSG306 if one of them does not fit the
    model: another width, another number of dimensions.
    """
    _check_given(cut)
    given = {name: known.get(name, node.meta["val"]) for name, node in cut.site.nodes.items()}
    fake_mode = next(value.fake_mode for value in given.values() if hasattr(value, "fake_mode"))
    with fake_mode:
        names = environment(cut, FakeDomain(known))
        found = rewrite(_only(cut, _entering(cut)), names)
        _check_absent(cut, names)
    for name, value in found.items():
        _check_input(cut, name, value, given[name])
    return found


def _check_input(cut: Cut, name: str, value: Any, old: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise SurgeryError("PSG305", f"{cut.operation.name}: '{name}' is rewritten to {value!r}")
    if value.dim() != old.dim() or (old.dim() > 2 and value.shape[2:] != old.shape[2:]):
        raise SurgeryError(
            "PSG306",
            f"{cut.operation.name}: the new {name} has shape {list(value.shape)}, which cannot "
            f"take the place of {list(old.shape)}",
        )


def check_inputs(cut: Cut) -> None:
    """Refuse a cut whose new values do not fit: PSG305 if there is nothing to rewrite, PSG306."""
    fake_inputs(cut, {})


def _check_given(cut: Cut) -> None:
    for name in cut.rule.rewrite:
        if name not in cut.site.nodes and name not in cut.rule.kind.optional:
            raise _not_given(cut, name)


def _check_absent(cut: Cut, bound: Mapping[str, Any]) -> None:
    """Refuse a rule that makes a value of an input which is not given."""
    for name in cut.rule.rewrite.keys() - cut.site.nodes.keys():
        try:
            value = rewrite(_only(cut, [name]), bound)[name]
        except (SurgeryError, AttributeError, TypeError) as error:  # nothing has no sizes
            raise _not_given(cut, name) from error
        if value is not None:
            raise _not_given(cut, name)


def _not_given(cut: Cut, name: str) -> SurgeryError:
    message = f"{cut.operation.name} rewrites '{name}', and the model has none for these inputs"
    return SurgeryError("PSG305", message, "call the model with inputs that give it")


def bound_names(rule: Rule) -> frozenset[str]:
    """The inputs that a rule rewrites or reads."""
    names = frozenset(rule.kind.values) - {*rule.kind.outputs}
    return names & {*rule.rewrite, *rule.reads()}


def plan_inputs(walk: Walk, cut: Cut) -> None:
    """Have a cut's new inputs made before all that reads them, and its new outputs at the end."""
    entering = [node for name in bound_names(cut.rule) if (node := cut.site.nodes.get(name))]
    placeholders = walk.program.graph.find_nodes(op="placeholder")
    last = max((*entering, *placeholders), key=walk.order.__getitem__)
    walk.after.setdefault(last, []).append(partial(_make_inputs, walk, cut))


def _make_inputs(walk: Walk, cut: Cut) -> None:
    """Put the new inputs in the place of the old ones, for what is not copied yet."""
    nodes, everywhere = cut.site.nodes, walk.values.everywhere
    old = {name: everywhere[nodes[name]] for name in bound_names(cut.rule) if name in nodes}
    known = {nodes[name]: node for name, node in old.items()}
    domain = ProxyDomain(walk, cut, known, nodes["embeds"])
    names, context = environment(cut, domain), domain.context(cut)
    new = rewrite(_only(cut, _entering(cut)), names, context)
    ends = {name: _finished(cut, name, value).node for name, value in new.items()}
    for name, node in old.items():
        node.meta.pop("input", None)
        ends.get(name, node).meta["input"] = ARGUMENTS[name]
    for name, node in ends.items():
        take_place(old[name], node, (GIVEN,))
        everywhere[nodes[name]] = node
    leaving = [name for name in cut.rule.kind.outputs if name in cut.rule.rewrite]
    end = walk.program.graph.output_node()

    def make_output(name: str) -> None:
        domain.tracer.origin = nodes[name]
        value = rewrite(_only(cut, [name]), names, context)[name]
        walk.values.put(nodes[name], [end], _finished(cut, name, value).node)

    walk.before.setdefault(end, {})[1, cut, None] = [partial(make_output, name) for name in leaving]


def new_inputs(graph: fx.Graph) -> tuple[list[str], fx.Graph]:
    """The arguments that go into the model behind its new inputs, and what computes them.

    The graph is the part of ``graph`` that computes them, and takes what ``graph`` takes.
    """
    part = fx.Graph()
    ends = [node for node in graph.nodes if "input" in node.meta]
    needed = {
        *graph.find_nodes(op="placeholder"),
        *reach(ends, lambda node: node.all_input_nodes),
    }
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in needed:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(tuple(copies[node] for node in ends))
    return [node.meta["input"] for node in ends], part


def _finished(cut: Cut, name: str, value: Any) -> Any:
    """Cast a new value to the dtype of the one it replaces; whole numbers stay."""
    dtype = dtype_of(cut.site.nodes[name])
    floats = dtype is not None and dtype.is_floating_point
    return cast(value, compute_dtype(cut), dtype) if floats else value


def _entering(cut: Cut) -> list[str]:
    """The inputs that a cut rewrites, of those that the call gives."""
    outputs = cut.rule.kind.outputs
    return [n for n in cut.rule.rewrite if n not in outputs and n in cut.site.nodes]


def _only(cut: Cut, names: Sequence[str]) -> Any:
    return cut.rule.model_copy(update={"rewrite": {n: cut.rule.rewrite[n] for n in names}})
