"""Masks that mask nothing but what comes later: not made, as the original does not make them.

    mask = (key <= query) & tokens[row, key]        in the graph, whatever the tokens are
    attend(q, k, v, mask)                           in every block

If no token is masked, attention is told that it is causal, which gives the same bits, and there is
no mask to make, to convert in every block, or to keep for the backward pass. Any other mask is
converted once, for all blocks. What a mask masks is read off the graph that makes it; a mask that
something else than attention reads, or that is made of anything else, is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from peftsurgery.capture.names import join
from peftsurgery.capture.plain import is_plain_call
from peftsurgery.capture.program import CAUSAL, Program, generate_forward
from peftsurgery.capture.schemas import op

Programs = Mapping[str, Sequence[Program]]


def without_idle_masks(programs: Programs) -> Programs:
    """The programs of a capture, whose top makes causal masks where they mask something else."""
    top = programs[""][0]
    source = top.graph if top.running is None else top.running
    found = {node.name: tokens for node in source.nodes for tokens in _causal_mask(node, programs)}
    if not found:
        return programs
    graph = fx.Graph()
    graph.output(graph.graph_copy(source, copies := dict[fx.Node, fx.Node]()))
    for node, copy in copies.items():
        if node.name in found:
            _make_by_need(copy, [copies[each] for each in found[node.name]])
    return {**programs, "": (top.rewritten(top.label, top.graph, graph), *programs[""][1:])}


class NeededMask:
    """What makes a causal mask in a graph, of the tokens that are seen and of other values."""

    __name__ = "needed_mask"

    def __init__(self, graph: fx.Graph, tokens: int) -> None:
        """``graph`` makes the mask; its first inputs, ``tokens`` of them, say which are seen."""
        self.make, self.tokens = generate_forward(graph, "mask"), tokens

    def __call__(self, *values: Any) -> Any:
        """The mask, or ``CAUSAL`` if all tokens are seen."""
        tokens = values[: self.tokens]
        if not _can_be_asked(tokens):
            return self.make(None, *values)
        if all(map(_keeps_all, tokens)):
            return CAUSAL
        mask = self.make(None, *values)
        mask.converted = {}
        return mask


def _can_be_asked(tokens: Sequence[Tensor]) -> bool:
    """Whether values can be looked at, and nothing looks on."""
    if any(each.is_meta for each in tokens) or not is_plain_call(tokens):
        return False
    on_cuda = any(each.is_cuda for each in tokens)
    return not (on_cuda and torch.cuda.is_current_stream_capturing())


def _keeps_all(tokens: Tensor) -> bool:
    return bool(tokens.all())


def _causal_mask(node: fx.Node, programs: Programs) -> Iterator[list[fx.Node]]:
    """The masks of tokens that a causal mask is made of, if a node is one for attention alone."""
    if not node.users or any(user.op != "call_module" for user in node.users):
        return
    parts = _parts(node)
    if parts is None or "causal" not in parts:
        return
    if all(_attends(user, node, "", programs) for user in node.users):
        yield [each for each in dict.fromkeys(parts) if isinstance(each, fx.Node)]


def _parts(node: Any) -> list[Any] | None:
    """What a mask is all of: "causal", inputs that mask tokens; None if it is anything else."""
    if not isinstance(node, fx.Node):
        return None
    match op(node), node.args:
        case "expand", (of, _):
            return _parts(of)
        case (("__and__" | "bitwise_and" | "logical_and"), (one, other)):
            both = _parts(one), _parts(other)
            return None if both[0] is None or both[1] is None else [*both[0], *both[1]]
        case "new_ones", (_, []) if node.kwargs.get("dtype") is torch.bool:
            return []
        case "le", (fx.Node() as keys, fx.Node() as queries):
            lengths = _counted(keys, -1), _counted(queries, -2)
            return ["causal"] if lengths[0] is not None and lengths[0] is lengths[1] else None
        case "index", (of, [fx.Node() as rows, fx.Node() as keys]):
            tokens = _uncast(of)
            places = _counted(rows, -4), _counted(keys, -1)
            return None if tokens is None or None in places else [tokens]
    return None


def _counted(node: Any, axis: int) -> fx.Node | None:
    """The number of positions, if a value counts them from zero along this axis of four."""
    added: list[int] = []
    while op(node) == "unsqueeze":
        node, dim = node.args
        added.insert(0, dim)
    if op(node) == "add" and node.args[1] == 0 and not node.kwargs:
        node = node.args[0]
    if op(node) != "arange" or len(node.args) != 1 or "dtype" in node.kwargs or len(added) != 3:
        return None
    place = 0
    for rank, dim in enumerate(added, 1):
        place += dim % (rank + 1) <= place
    count = node.args[0]
    return count if place - 4 == axis and isinstance(count, fx.Node) else None


def _uncast(node: Any) -> fx.Node | None:
    """The input, a mask (row, token), that a value is another dtype of."""
    while op(node) == "to" and node.args:
        node = node.all_input_nodes[0]
    value = node.meta.get("val")
    is_mask = node.op == "placeholder" and isinstance(value, Tensor) and value.dim() == 2
    return node if is_mask else None


def _attends(call: fx.Node, mask: fx.Node, path: str, programs: Programs) -> bool:
    """Whether a called block does nothing with a mask but attend with it."""
    place = join(path, str(call.target))
    label = call.kwargs.get("program")
    program = next((each for each in programs.get(place, ()) if each.label == label), None)
    if program is None or mask in call.kwargs.values():
        return False
    graph = program.graph if program.running is None else program.running
    given = list(zip(graph.find_nodes(op="placeholder"), call.args, strict=False))
    return all(
        _attends(user, inner, place, programs)
        if user.op == "call_module"
        else _is_core(user, inner)
        for inner, value in given
        if value is mask
        for user in inner.users
    )


def _is_core(node: fx.Node, mask: fx.Node) -> bool:
    """Whether a node is attention of the model's own with this mask."""
    if op(node) != "scaled_dot_product_attention" or list(node.all_input_nodes).count(mask) != 1:
        return False
    is_mask = len(node.args) > 3 and node.args[3] is mask
    return is_mask and not any("surgery" in each.meta for each in node.all_input_nodes)


def _make_by_need(mask: fx.Node, tokens: Sequence[fx.Node]) -> None:
    """Put one call in the place of all that makes a mask."""
    graph, needed = mask.graph, _made_of(mask)
    inputs = list(dict.fromkeys([*tokens, *(node for node in needed if _is_given(node))]))
    made = fx.Graph()
    copies = {node: made.placeholder(node.name) for node in inputs}
    for node in needed:
        if node not in copies:
            copies[node] = made.node_copy(node, copies.__getitem__)
    made.output(copies[mask])
    with graph.inserting_before(mask):
        new = graph.call_function(NeededMask(made, len(tokens)), tuple(inputs))
    new.meta = {**mask.meta}
    mask.replace_all_uses_with(new)
    for node in reversed(needed):
        if not node.users and not _is_given(node):
            graph.erase_node(node)


def _made_of(mask: fx.Node) -> list[fx.Node]:
    """What a mask is made of down to what is given, in order."""
    found: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        if node not in found:
            for source in () if _is_given(node) else node.all_input_nodes:
                visit(source)
            found[node] = None

    visit(mask)
    return list(found)


def _is_given(node: fx.Node) -> bool:
    """Whether a value is an input, or no tensor: a size, a device."""
    return node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor)
