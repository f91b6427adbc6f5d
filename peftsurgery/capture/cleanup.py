"""Clean-up passes over a flat exported graph: leftovers of the tracer go, what it fixed follows.

In order: regions without gradient or with autocast are inlined, assertions and casts that change
nothing are dropped, in-place arithmetic becomes ordinary, tensors that are filled piece by piece
become concatenations, sums over named axes become products of matrices, operands that are one
tensor get names of their own, train flags and devices become values of the graph, every user of a
tied weight reads it by its own name, and arithmetic on sizes moves to the front.
Each pass changes the graph in place and leaves what it computes unchanged.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import fx

from peftsurgery.capture import ops
from peftsurgery.capture.contractions import spell_out
from peftsurgery.capture.higher_order import AUTOCAST, inline_regions
from peftsurgery.capture.loops.running import loop_turns, turns_of
from peftsurgery.capture.module_calls import hand_on
from peftsurgery.capture.names import join
from peftsurgery.capture.operands import part_operands
from peftsurgery.capture.pieces import join_pieces
from peftsurgery.capture.randomness import RATE, TRAIN_FLAGS, is_random
from peftsurgery.capture.schemas import arguments, shares_memory, writes
from peftsurgery.capture.stack import inherit, stack_paths

aten = torch.ops.aten

_ASSERTIONS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
)
_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device)


def clean_up(
    module: fx.GraphModule,
    aliases: Mapping[str, Sequence[str]],
    counters: frozenset[str],
    dropouts: frozenset[str],
    mode: bool | None = None,
) -> None:
    """Run every pass over ``module.graph``.

    ``aliases`` maps each name of a tensor to all names of it; ``counters`` are the names of buffers
    that count batches, ``dropouts`` the paths of dropout modules, whose ``p`` may be set at any
    time. A graph for eval mode keeps the train flags that are set even there.
    """
    inline_regions(module)
    graph = module.graph
    drop_assertions(graph)
    drop_idle_casts(graph)
    make_functional(graph)
    join_pieces(graph)
    spell_out(graph)
    part_operands(graph)
    if mode is not False:
        follow_training(graph, counters, dropouts)
    follow_device(graph)
    name_by_user(graph, aliases)
    drop_unused(graph)
    sizes_first(graph)


def drop_assertions(graph: fx.Graph) -> None:
    """Remove the tracer's runtime checks; a capture checks its inputs' fixed sizes instead."""
    for target in _ASSERTIONS:
        for node in graph.find_nodes(op="call_function", target=target):
            graph.erase_node(node)


def drop_idle_casts(graph: fx.Graph) -> None:
    """Remove casts to the dtype a tensor has, and full-range slices: they return their input."""
    for node in list(graph.nodes):
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        source = node.args[0]
        if (node.target in _CASTS and _same_kind(node, source)) or _is_full_slice(node):
            hand_on(node, source)
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _same_kind(node: fx.Node, source: fx.Node) -> bool:
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    given = arguments(node)
    copies = given.get("copy") or given.get("memory_format") is not None
    return bool(not copies and before.dtype == after.dtype and before.device == after.device)


def _is_full_slice(node: fx.Node) -> bool:
    if node.target is not aten.slice.Tensor:
        return False
    given = arguments(node)
    is_to_end = given["end"] is None or _is_unbounded(given["end"])
    return given["start"] in (None, 0) and given["step"] == 1 and is_to_end


def _is_unbounded(end: object) -> bool:
    return isinstance(end, int) and end == torch.iinfo(torch.int64).max


def make_functional(graph: fx.Graph) -> None:
    """Turn in-place arithmetic on a value that nothing else sees into its ordinary form."""
    turns = turns_of(graph)
    for node in list(graph.nodes):
        ordinary = _ordinary_form(node)
        target = node.args[0] if node.args else None
        if ordinary is None or not isinstance(target, fx.Node):
            continue
        made_here = target.op == "call_function" and shares_memory(target.target) is False
        is_written_once = turns.get(target) is turns.get(node) and set(target.users) == {node}
        if made_here and is_written_once and _agrees(node, ordinary):
            node.target = ordinary


def _agrees(node: fx.Node, ordinary: Callable[..., object]) -> bool:
    """Whether the ordinary form gives the same kind of tensor: in place, nothing is promoted."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: source.meta.get("val"))
    expected = node.meta.get("val")
    try:
        made = ordinary(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError):  # no such form for these values
        return False
    return (
        isinstance(made, torch.Tensor)
        and isinstance(expected, torch.Tensor)
        and (made.dtype, made.shape) == (expected.dtype, expected.shape)
    )


def _ordinary_form(node: fx.Node) -> Callable[..., object] | None:
    """``aten.add.Tensor`` for ``aten.add_.Tensor``; None if there is no such pair."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    name = node.target._schema.name.removeprefix("aten::")
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(aten, name.removesuffix("_"), None)
    return getattr(packet, node.target._overloadname, None) if packet is not None else None


def follow_training(graph: fx.Graph, counters: frozenset[str], dropouts: frozenset[str]) -> None:
    """Make every train flag and attention dropout read ``training`` of the module it belongs to.

    A dropout module's rate is read of it too.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target is aten.add_.Tensor and getattr(node.args[0], "target", None) in counters:
            with graph.inserting_before(node):
                node.args = (node.args[0], _read(graph, node, "training"))
            node.target = ops.count
            continue
        following = _following(node.target)
        if not following or _has_no_statistics(node):
            continue
        for index, name in following:
            _follow_argument(graph, node, index, name, dropouts)


@lru_cache(maxsize=4096)
def _following(target: torch._ops.OpOverload) -> Sequence[tuple[int, str]]:
    """The places and names of an operator's arguments that may follow train() and eval()."""
    names = [argument.name for argument in target._schema.arguments]
    return [
        (index, name) for index, name in enumerate(names) if name in TRAIN_FLAGS or name == RATE
    ]


def _has_no_statistics(node: fx.Node) -> bool:
    """Whether a norm keeps no running statistics: it takes the batch's in eval mode too."""
    given = arguments(node)
    return "running_mean" in given and given["running_mean"] is None


def _follow_argument(
    graph: fx.Graph, node: fx.Node, index: int, name: str, dropouts: frozenset[str]
) -> None:
    value = node.args[index] if index < len(node.args) else node.kwargs.get(name)
    with graph.inserting_before(node):
        if name in TRAIN_FLAGS and value is True:
            follower = _read(graph, node, "training")
        elif name == RATE and is_random(node.target, node.args, node.kwargs):
            if _owner(node) not in dropouts:
                return
            follower = _read(graph, node, RATE)
        elif name in TRAIN_FLAGS and isinstance(value, float) and value > 0:
            follower = graph.call_function(ops.rate, (value, _read(graph, node, "training")))
            inherit(follower, node)
        else:
            return
    if index < len(node.args):
        node.update_arg(index, follower)
    else:
        node.update_kwarg(name, follower)


def _read(graph: fx.Graph, node: fx.Node, attribute: str) -> fx.Node:
    """The attribute of the module that a node belongs to."""
    owner = _owner(node)
    read = graph.create_node("get_attr", join(owner, attribute))
    inherit(read, node)
    return read


def _owner(node: fx.Node) -> str:
    """The path of the module whose forward made a node."""
    paths = stack_paths(node)
    return paths[-1][1] if paths else ""


def follow_device(graph: fx.Graph) -> None:
    """Replace the device the export ran on by the device of the first tensor input."""
    users = [node for node in graph.nodes if _devices(node)]
    tensors = [
        node
        for node in graph.find_nodes(op="placeholder")
        if isinstance(node.meta.get("val"), torch.Tensor)
    ]
    if not users or not tensors:
        return
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        device = graph.call_function(ops.device_of, (tensors[0],))
    for node in users:
        node.args = tuple(device if isinstance(arg, torch.device) else arg for arg in node.args)
        node.kwargs = {
            key: device if isinstance(arg, torch.device) else arg
            for key, arg in node.kwargs.items()
        }


def _devices(node: fx.Node) -> list[torch.device]:
    values = (*node.args, *node.kwargs.values())
    return [value for value in values if isinstance(value, torch.device)]


def name_by_user(graph: fx.Graph, aliases: Mapping[str, Sequence[str]]) -> None:
    """Let each user of a tied tensor read it by the name it has under the user's own module."""
    for node in list(graph.nodes):
        if node.op != "get_attr" or len(aliases.get(str(node.target), ())) < 2:
            continue
        for user in list(node.users):
            name = _own_name(user, str(node.target), aliases[str(node.target)])
            if name != node.target:
                with graph.inserting_before(node):
                    own = graph.create_node("get_attr", name)
                own.meta.update(node.meta)
                user.replace_input_with(node, own)
        if not node.users:
            graph.erase_node(node)


def _own_name(user: fx.Node, name: str, names: Sequence[str]) -> str:
    for _, path in reversed(stack_paths(user)):
        under = [other for other in names if other.startswith(f"{path}.")]
        if under:
            return under[0]
    return name


def drop_unused(graph: fx.Graph) -> None:
    """Remove what nothing uses and has no effect.

    fx's own elimination first looks up every get_attr in the exported module, where the names this
    clean-up introduced do not exist.
    """
    for node in reversed(graph.nodes):
        if not node.users and not _has_effect(node):
            graph.erase_node(node)


def sizes_first(graph: fx.Graph) -> None:
    """Move arithmetic on input sizes to the front: blocks take sizes, none computes another's."""
    anchor = graph.find_nodes(op="placeholder")[-1] if graph.find_nodes(op="placeholder") else None
    if anchor is None:
        return
    early = set(graph.find_nodes(op="placeholder"))
    for node in list(graph.nodes):
        if node in early or not _is_size(node) or not early.issuperset(node.all_input_nodes):
            continue
        anchor.append(node)
        node.meta.pop("nn_module_stack", None)
        early.add(node)
        anchor = node


def _is_size(node: fx.Node) -> bool:
    if node.target in (ops.device_of, ops.past_length, ops.layer_of):
        return True
    arithmetic = node.target is aten.sym_size.int or (
        getattr(node.target, "__module__", None) in ("_operator", "math", "torch")
        and node.target is not operator.getitem
    )
    value = node.meta.get("val")
    return node.op == "call_function" and arithmetic and isinstance(value, int | torch.SymInt)


def _has_effect(node: fx.Node) -> bool:
    """Whether a node must stay although nothing uses its value."""
    if node.op in ("placeholder", "output"):
        return True
    return (
        writes(node.target)
        or node.target in (ops.count, ops.remember, loop_turns)
        or node.target in AUTOCAST
    )
