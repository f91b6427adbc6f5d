"""Programs as torch.compile makes them: each distinct stretch of code once, called from the graph.

    embedding, arange, cos, ...           ->   embedding, arange, cos, ...
    block(h, program="LlamaDecoderLayer.0")    block(h, program="LlamaDecoderLayer.0")
    mean, linear, cross_entropy, ...           compiled stretch

A stretch is what a program computes between two calls of blocks: all that an innermost block does,
and what the model does between and behind its blocks. (What comes before the first block, masks and
tables of positions, is little work in many kernels.) Its tensors are read by name around it and are
its arguments, so blocks of one shape class call one function, whatever holds their tensors, and
hooks, recomputation and caches stay outside of what is compiled.
"""

from __future__ import annotations

import inspect
import itertools
import operator
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx
from torch._dynamo.exc import BackendCompilerFailed

from peftsurgery.capture import ops
from peftsurgery.capture.calling import PartCall
from peftsurgery.capture.copying import SharedByCopies
from peftsurgery.capture.higher_order import AUTOCAST
from peftsurgery.capture.program import Program, generate_forward
from peftsurgery.errors import SurgeryError

# What speaks to a cache of Python, or changes what surrounds the calls behind it.
_BETWEEN = frozenset({ops.past_length, ops.layer_of, ops.remember, *AUTOCAST})
FEW = 8
"""A stretch of fewer calls runs as it is: to call it compiled would cost more."""
VARIANTS = 64
"""So often one stretch is compiled at most: for trained and for frozen inputs, for other sizes."""
_NUMBERS = itertools.count()


class Compiling(SharedByCopies):
    """Programs compiled with the same options; models that are copies of each other share it."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """``options`` are torch.compile's. Raises PSG223 for any that it does not take."""
        known = inspect.signature(torch.compile).parameters.keys() - {"model"}
        unknown = sorted(options.keys() - known)
        if unknown:
            message = f"torch.compile has no option '{unknown[0]}'"
            raise SurgeryError("PSG223", message, f"it has {', '.join(sorted(known))}")
        self._options = {"recompile_limit": VARIANTS, **options}
        try:
            torch.compile(generate_forward(fx.Graph(), "nothing"), **self._options)
        except (RuntimeError, AssertionError, TypeError) as error:
            raise SurgeryError("PSG223", f"torch.compile refuses its options: {error}") from error
        self._programs: WeakKeyDictionary[Program, Program] = WeakKeyDictionary()
        self._stretches: dict[Hashable, CompiledStretch] = {}

    def program(self, program: Program) -> Program:
        """The program with its stretches compiled; itself, where a call is part of another trace.

        That is within torch.compile, torch.export and the transforms of torch.func.
        """
        if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack():
            return program
        found = self._programs.get(program)
        if found is None:
            shapes = frozenset(program.tensors.items())
            stretch = partial(self._stretch, shapes)
            running = _with_stretches(program.running or program.graph, stretch)
            found = program.rewritten(program.label, program.graph, running)
            self._programs[program] = found
        return found

    def _stretch(self, shapes: Hashable, graph: fx.Graph) -> CompiledStretch:
        """The compiled function of a graph in a program whose tensors have these shapes.

        Of two graphs that read alike there it is the same. Each has a label of its own: sizes that
        Dynamo saw change in code of one label, it takes for dynamic.
        """
        code = graph.python_code("self")
        key = (shapes, code.src, tuple((name, id(value)) for name, value in code.globals.items()))
        if key not in self._stretches:
            plain = generate_forward(graph, f"stretch {next(_NUMBERS)}")
            self._stretches[key] = CompiledStretch(torch.compile(plain, **self._options))
        return self._stretches[key]


class CompiledStretch:
    """A function of tensors and sizes, compiled when a call first needs it."""

    __name__ = "stretch"

    def __init__(self, compiled: Callable[..., Any]) -> None:
        self.compiled = compiled

    def __call__(self, *values: Any) -> Any:
        """What the stretch computes. PSG224 if its backend fails."""
        try:
            return self.compiled(None, *values)
        except BackendCompilerFailed as error:
            message = f"the model cannot be compiled: {_reason(error.inner_exception)}"
            hint = "compile(backend='aot_eager') needs no compiler, compile(disable=True) undoes it"
            raise SurgeryError("PSG224", message, hint) from error


def _reason(error: Exception) -> str:
    """The kind of an error and the beginning of what it says, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split()):.200}"


def _with_stretches(graph: fx.Graph, stretch: Callable[[fx.Graph], Any]) -> fx.Graph:
    """A graph in which long stretches are calls of what ``stretch`` makes of their own graph."""
    made, value_of = fx.Graph(), dict[fx.Node, fx.Node]()
    is_before = bool(graph.find_nodes(op="call_module"))
    for nodes in _divided(graph):
        is_before = is_before and not any(node.op == "call_module" for node in nodes)
        if is_before or sum(node.op == "call_function" for node in nodes) < FEW:
            for node in nodes:
                value_of[node] = made.node_copy(node, value_of.__getitem__)
            continue
        read = dict.fromkeys(value for node in nodes for value in node.all_input_nodes)
        inputs = [node for node in read if node not in nodes]
        outputs = [node for node in nodes if not node.users.keys() <= nodes.keys()]
        function = stretch(_function(nodes, inputs, outputs))
        values = made.call_function(function, tuple(value_of[node] for node in inputs))
        for number, node in enumerate(outputs):
            value_of[node] = made.call_function(operator.getitem, (values, number))
    return made


def _divided(graph: fx.Graph) -> Iterator[dict[fx.Node, None]]:
    """The nodes of a graph, in an order that it can run in: stretches, and single ones between."""
    stretch: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            yield {node: None}
        elif _is_between(node):
            yield from filter(None, (stretch, {node: None}))
            stretch = {}
        else:
            stretch[node] = None


def _is_between(node: fx.Node) -> bool:
    """Whether a node calls a module or a cache, changes what is around it, or ends the graph."""
    is_call = node.op == "call_module" or isinstance(node.target, PartCall)
    return is_call or node.op == "output" or node.target in _BETWEEN


def _function(
    nodes: Iterable[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> fx.Graph:
    """The graph of some nodes by themselves, under names that follow from what they do alone."""
    made, value_of = fx.Graph(), dict[fx.Node, fx.Node]()
    for number, node in enumerate(inputs):
        value_of[node] = made.placeholder(f"input_{number}")
    for node in nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), value_of.__getitem__)
        value_of[node] = made.create_node(node.op, node.target, args, kwargs)
    made.output(tuple(value_of[node] for node in outputs))
    return made
