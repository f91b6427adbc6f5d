"""A program is a graph and the one forward generated from it.

Blocks of equal structure share a program, so they share one code object: compiling a block once
serves them all, and whatever is learnt of the graph (its sites, their roles) is learnt once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from peftsurgery.capture.copying import SharedByCopies
from peftsurgery.capture.higher_order import AUTOCAST
from peftsurgery.errors import SurgeryError

_FUNCTIONS = (
    *("add", "sub", "mul", "div", "neg", "pow", "rsqrt", "sqrt", "exp", "cos", "sin", "tanh"),
    *("sigmoid", "relu", "mean", "cat", "stack", "matmul", "bmm", "mm", "addmm", "transpose", "t"),
    *("unsqueeze", "squeeze", "reshape", "where", "masked_fill", "embedding", "layer_norm"),
    *("dropout", "softmax", "eq", "ne", "lt", "le", "gt", "ge", "select", "permute", "flatten"),
    *("unflatten", "chunk", "conv2d", "cumsum", "gather", "abs", "log"),
)
_METHODS = ("view", "expand", "contiguous", "detach")
_LAYERS = ("linear", "silu", "gelu", "scaled_dot_product_attention")

_OPERATOR = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)(?=\()")
_FORMAT = re.compile(r"torch\.(contiguous_format|preserve_format|channels_last)")
# Operators whose bindings take the same arguments in the same order, in every overload that a
# capture has, or else in those that are named.
BINDINGS = {
    **{name: f"torch.{name}" for name in _FUNCTIONS},
    **{name: f"torch.Tensor.{name}" for name in _METHODS},
    **{name: f"torch._C._nn.{name}" for name in _LAYERS},
    **{f"to.{overload}": "torch.Tensor.to" for overload in ("dtype", "device", "other")},
    "sym_size.int": "torch.Tensor.size",
    "new_ones.default": "torch.Tensor.new_ones",
    **{f"arange.{overload}": "torch.arange" for overload in ("default", "start", "start_step")},
}


@dataclass(frozen=True)
class ModuleInfo:
    """Class name and settings of a module, for print(model) and ``where: {type: ...}``."""

    type: str
    settings: str = ""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor that a program reads, by shape and dtype; a parameter or else a buffer.

    ``tied`` numbers the tensors of a model that have several names; others have False.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    parameter: bool
    tied: int = False


@dataclass(frozen=True, eq=False)
class Program(SharedByCopies):
    """A shape class: one graph, one generated forward, for every block of this structure.

    ``graph`` reads tensors by ``get_attr`` nodes whose targets are relative to the block, and calls
    nested blocks by ``call_module`` nodes that name the child's program in the keyword ``program``.
    ``home`` is the path of the block it was first made for, of which its nodes' origins speak.
    ``running`` computes what ``graph`` does in another way, if there is a faster one: it is run.
    ``forward(self, *args)`` runs it for any module that has tensors of these names.
    """

    label: str
    graph: fx.Graph
    kind: str
    modules: Mapping[str, ModuleInfo]
    tensors: Mapping[str, TensorInfo]
    home: str = ""
    running: fx.Graph | None = None
    forward: Callable[..., Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        graph = self.graph if self.running is None else self.running
        object.__setattr__(self, "forward", generate_forward(graph, self.label))

    def rewritten(self, label: str, graph: fx.Graph, running: fx.Graph | None = None) -> Program:
        """A program of the same block with another graph."""
        return Program(label, graph, self.kind, self.modules, self.tensors, self.home, running)

    @property
    def code(self) -> str:
        """The Python source of the forward."""
        return self.graph.python_code("self").src


def generate_forward(graph: fx.Graph, label: str) -> Callable[..., Any]:
    """The function that runs ``graph``; ``self`` provides its tensors and nested blocks."""
    python = graph.python_code("self")
    scope = dict(python.globals)
    source = _with_bindings(_with_regions(_with_reads(python.src, graph), scope))
    exec(compile(source, f"<peftsurgery {label}>", "exec"), scope)
    forward: Callable[..., Any] = scope["forward"]
    return forward


def _with_reads(source: str, graph: fx.Graph) -> str:
    """The source with each part looked up once, and what it holds read from its own tables.

    Modules look up what they hold by a function of Python, which takes as long as a small operator.
    What is in no table (the parametrised, the pruned) is read by name, as ever.
    """
    reads = {n.name: n for n in graph.nodes if n.op in ("get_attr", "call_module")}
    lines, parts = list[str](), {"": "self"}
    for line in source.splitlines():
        name, _, code = line.strip().partition(" = ")
        read = _by_name(str(reads[name].target)) if name in reads else ""
        if not read or not code.startswith(read):
            lines.append(line)
            continue
        holder, _, leaf = str(reads[name].target).rpartition(".")
        for path in _paths(holder):
            if path not in parts:
                around, _, part = path.rpartition(".")
                parts[path] = f"part_{len(parts)}"
                lines.append(f"    {parts[path]} = {_found(parts[around], '_modules', part)}")
        table = "_parameters" if reads[name].op == "get_attr" else "_modules"
        lines.append(f"    {name} = ({_found(parts[holder], table, leaf)}){code[len(read) :]}")
    return "\n".join(lines)


def _paths(path: str) -> Iterator[str]:
    """The paths of a part and of those around it, outer ones first; none for the model's own."""
    names = path.split(".") if path else []
    return (".".join(names[: count + 1]) for count in range(len(names)))


def _by_name(path: str) -> str:
    """How a generated forward reads what is at a path."""
    text = "self"
    for name in path.split("."):
        text = f"{text}.{name}" if name.isidentifier() else f'getattr({text}, "{name}")'
    return text


def _found(part: str, table: str, name: str) -> str:
    """What a part has in a table under a name, or else as an attribute."""
    return f'{part}.{table}["{name}"] if "{name}" in {part}.{table} else getattr({part}, "{name}")'


def _with_bindings(source: str) -> str:
    """The source with torch's own functions and methods for operators that have them.

    They reach the same operators, and bind their arguments in a third of the time.
    """

    def binding(found: re.Match[str]) -> str:
        name, overload = found.groups()
        if name == "to" and _FORMAT.search(source, found.end(), source.find("\n", found.end())):
            return found[0]  # the method takes it by its name alone
        return BINDINGS.get(name) or BINDINGS.get(f"{name}.{overload}") or found[0]

    return _OPERATOR.sub(binding, source)


def _with_regions(source: str, scope: dict[str, Any]) -> str:
    """The source with a ``with`` for every region of autocast, so that an exception leaves it too.

    PSG201 if a region begins in one block and ends in another.
    """
    names = {function: name for name, function in scope.items() if function in AUTOCAST}
    if not names:
        return source
    begin, end = (f" = {names.get(function)}(" for function in AUTOCAST)
    scope["_autocast"] = torch.autocast
    lines, depth = list[str](), 0
    for line in source.splitlines():
        inner = "    " * depth
        if begin in line:
            lines.append(f"{inner}    with _autocast({line.split(begin)[1].split(')')[0]}):")
            lines.append(f"{inner}        pass")
            depth += 1
        elif end in line:
            depth -= 1
        else:
            lines.append(inner + line)
        if depth < 0:
            break
    if depth:
        message = "a region of autocast that begins in one block ends in another"
        raise SurgeryError("PSG201", message)
    return "\n".join(lines)
