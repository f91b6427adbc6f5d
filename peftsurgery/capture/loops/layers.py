"""Recurrent layers of torch, as the one operator that each is, for any number of steps.

torch takes ``aten.lstm`` apart to know the sizes of what it gives, step by step, and so fixes how
many steps there are. The sizes follow from those of one step.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_slot,
    maybe_enable_thunkify,
    track_tensor,
)

_OPERATORS = {
    name: getattr(torch.ops.aten, name).input for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")
}


def is_recurrent(function: Any, args: Sequence[Any]) -> bool:
    """Whether a call is one of a recurrent layer on steps of no fixed number.

    Its arguments are those of ``aten.lstm.input``, or of ``aten.gru.input`` and its like. A call on
    sequences of unlike lengths (``.data``) is none.
    """
    if getattr(function, "__name__", "") not in _OPERATORS or len(args) != 9:
        return False
    x, _, weights, *_, batch_first = args
    is_of_steps = type(x) is FakeTensor and x.dim() == 3 and isinstance(weights, list | tuple)
    return is_of_steps and isinstance(x.shape[1 if batch_first else 0], torch.SymInt)


def recurrence(tracer: Any, function: Any, args: Sequence[Any]) -> tuple[torch.Tensor, ...] | None:
    """What a recurrent layer gives, as one node; None for tensors that are no nodes.

    Its output is (steps, batch, features) in memory, whichever comes first.
    """
    x, *others, batch_first = args
    nodes = fx.node.map_aggregate(
        tuple(args), lambda v: node_of(v, tracer) if isinstance(v, torch.Tensor) else v
    )
    tensors: list[Any] = [x, *others[1]]
    if any(node_of(tensor, tracer) is None for tensor in tensors):
        return None
    axis = 1 if batch_first else 0
    with torch._C.DisableTorchFunction(), disable_proxy_modes_tracing():
        output, *states = function(x.narrow(axis, 0, 1), *others, batch_first)
        steps = output.transpose(0, axis)
        steps = steps.expand(x.shape[axis], *steps.shape[1:])
        output = steps.clone(memory_format=torch.contiguous_format).transpose(0, axis)
    node = appended(tracer, _OPERATORS[function.__name__], nodes)
    node.meta["val"] = made = (output, *states)
    for number, value in enumerate(made):
        pick = appended(tracer, operator.getitem, (node, number))
        pick.meta["val"] = value
        with maybe_enable_thunkify():
            track_tensor(value, fx.Proxy(pick, tracer), constant=None, tracer=tracer)
    return made


def node_of(tensor: Any, tracer: Any) -> fx.Node | None:
    """The node that a tensor is; None for a constant."""
    slot: Any = get_proxy_slot(tensor, tracer, None) if isinstance(tensor, FakeTensor) else None
    return None if slot is None or slot.constant is not None else slot.proxy.node


def appended(tracer: Any, target: Any, args: Any) -> fx.Node:
    """A new node at the end of what is traced, made by the module that runs."""
    like = tracer.graph._root.prev.meta
    made: fx.Node = tracer.graph.create_node("call_function", target, args)
    made.meta = {key: like[key] for key in ("stack_trace",) if key in like}
    made.meta["nn_module_stack"] = {
        key: (path, f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else kind)
        for key, (path, kind) in tracer.module_stack.items()
    }
    return made
