"""The form of a graph that is run where no gradient is recorded: fewer operators, the same bits.

    slice(x, 3, 0, 32), slice(x, 3, 32, 64)    ->    split_with_sizes(x, [32, 32], 3)
    transpose(view(x, [n, 1, -1, 64]), 1, 2)   ->    reshape(x, [n, -1, 1, 64])
    pow(x, 2)                                  ->    mul(x, x)
    mean(x, [-1], True) + 1e-6                 ->    addcdiv(1e-6, sum(x, -1, True), 512)
    add(y, linear(x, W))                       ->    linear(x, W).add_(y)

A small model spends as long on calling its operators as on what they compute. With gradients, each
of these would add up a gradient in another order, or write over what the backward pass reads;
without, nothing tells them apart. Which are right follows from the operators' schemas and from the
sizes, strides and dtypes of the traced values. A graph that writes to memory itself, or reads a
value in every turn of a loop, is left alone.
"""

from __future__ import annotations

from collections.abc import Container, Iterator

import torch
from torch import Tensor, fx

from peftsurgery.capture.loops.running import has_loops
from peftsurgery.capture.reshapes import join_reshapes, join_slices
from peftsurgery.capture.schemas import op, overwritten, shares_memory
from peftsurgery.capture.shifted_mean import ShiftedMean, shift_means

aten = torch.ops.aten

# Operators whose results are memory of their own, beside those that work entry by entry.
_FRESH = {
    *("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "mean", "sum", "cat", "embedding"),
    *("layer_norm", "group_norm", "softmax"),
}
# One that gives back a value that is not complex itself, though its schema says that it does not.
_GIVES_BACK = "conj_physical"
_COMMUTATIVE = ("add", "mul")


def no_grad_form(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph that computes the same where no gradient is recorded.

    The blocks that it calls are told so (``recorded=False``).
    """
    made = fx.Graph()
    made.output(made.graph_copy(graph, {}))
    if not has_loops(made) and not any(True for node in made.nodes for _ in overwritten(node)):
        _drop_idle(made)
        _multiply_squares(made)
        join_slices(made)
        join_reshapes(made)
        shift_means(made)
        _write_in_place(made)
    for call in made.find_nodes(op="call_module"):
        call.kwargs = {**call.kwargs, "recorded": False}
    return made


def _drop_idle(graph: fx.Graph) -> None:
    """Remove what gives the values of its input: a detached value, a product with one."""
    for node in list(graph.nodes):
        if not node.args or not isinstance(node.args[0], fx.Node) or _is_given_on(node):
            continue
        is_product = op(node) == "mul" and node.args[1:] == (1.0,) and _is_floating(node.args[0])
        if not node.kwargs and (op(node) == "detach" or is_product):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _is_given_on(node: fx.Node) -> bool:
    """Whether whoever calls the graph gets a value, so that it is not to be another's memory."""
    return any(user.op == "output" for user in node.users)


def _multiply_squares(graph: fx.Graph) -> None:
    """Replace squares by products, which is how their kernels compute them."""
    for node in graph.find_nodes(op="call_function", target=aten.pow.Tensor_Scalar):
        value, power = node.args
        if power == 2 and _is_floating(value):
            node.target, node.args = aten.mul.Tensor, (value, value)


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _write_in_place(graph: fx.Graph) -> None:
    """Let operators that work entry by entry write into an operand that nothing else reads."""
    own = set(filter(_is_fresh, graph.nodes))
    for node in graph.nodes:
        written = _written_form(node)
        place = None if written is None else next(_places(node, own), None)
        if written is not None and place is not None:
            others = [value for number, value in enumerate(node.args) if number != place]
            node.args = (node.args[place], *others)
            node.target = written


def _is_fresh(node: fx.Node) -> bool:
    """Whether a value is memory of its own, whatever its operator is given."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or shares_memory(target) is not False:
        return isinstance(target, ShiftedMean)
    is_pointwise = torch.Tag.pointwise in target.tags and op(node) != _GIVES_BACK
    return op(node) in _FRESH or is_pointwise


def _written_form(node: fx.Node) -> torch._ops.OpOverload | None:
    """``aten.add_.Tensor`` for ``aten.add.Tensor``; None if an operator has no such form."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.pointwise not in target.tags:
        return None
    packet = getattr(aten, f"{target._schema.name.removeprefix('aten::')}_", None)
    found = getattr(packet, target._overloadname, None)
    return found if isinstance(found, torch._ops.OpOverload) else None


def _places(node: fx.Node, own: Container[fx.Node]) -> Iterator[int]:
    """The operands that a node may write to, by their places in its arguments."""
    is_even = op(node) in _COMMUTATIVE and len(node.args) == 2 and not node.kwargs
    given = [*node.args, *node.kwargs.values()]
    for place, value in enumerate(node.args[: 2 if is_even else 1]):
        if not isinstance(value, fx.Node) or value not in own or set(value.users) != {node}:
            continue
        if sum(each is value for each in given) == 1 and _kind(value) == _kind(node):
            yield place


def _kind(node: fx.Node) -> object:
    """Dtype, sizes and strides of a value; symbols as texts, since comparing them adds guards."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return node
    places = zip(value.shape, value.stride(), strict=True)
    steps = [None if type(size) is int and size == 1 else str(step) for size, step in places]
    return value.dtype, list(map(str, value.shape)), steps
