"""A program is a graph and the one forward generated from it.

Blocks of equal structure share a program, so they share one code object: compiling a block once
serves them all, and whatever is learnt of the graph (its sites, their roles) is learnt once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from peftsurgery.capture.copying import SharedByCopies
from peftsurgery.capture.higher_order import AUTOCAST
from peftsurgery.capture.loops.running import with_loops
from peftsurgery.capture.no_grad_form import no_grad_form
from peftsurgery.capture.plain import is_plain_call
from peftsurgery.errors import SurgeryError

_FUNCTIONS = (
    *("add", "sub", "mul", "div", "neg", "pow", "rsqrt", "sqrt", "exp", "cos", "sin", "tanh"),
    *("sigmoid", "relu", "mean", "cat", "stack", "matmul", "bmm", "mm", "addmm", "transpose", "t"),
    *("unsqueeze", "squeeze", "reshape", "where", "masked_fill", "embedding", "layer_norm"),
    *("dropout", "softmax", "eq", "ne", "lt", "le", "gt", "ge", "select", "permute", "flatten"),
    *("unflatten", "chunk", "conv2d", "cumsum", "gather", "abs", "log"),
)
_END = str(torch.iinfo(torch.int64).max)
_METHODS = ("view", "expand", "contiguous", "detach")
_LAYERS = ("linear", "silu", "gelu", "scaled_dot_product_attention")

_OPERATOR = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)(?=\()")
_SLICE = re.compile(r"torch\.ops\.aten\.slice\.Tensor\((\w+), (\d+), (\w+), (\w+)\)")
_REMEMBERED = re.compile(r"peftsurgery_capture_ops_with_past\(\w+, (\w+), (\d+)\)")
_MASKED = re.compile(
    r"torch\.ops\.aten\.scaled_dot_product_attention\.default(?=\(\w+, \w+, \w+, (?!None\b)\w+[,)])"
)
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
    "split_with_sizes": "torch.Tensor.split_with_sizes",
    **{f"arange.{overload}": "torch.arange" for overload in ("default", "start", "start_step")},
}


# And the forms of these that write in place.
BINDINGS |= {
    f"{name}_": f"{place}.{name}_"
    for place, holder in (("torch.Tensor", torch.Tensor), ("torch._C._nn", torch._C._nn))
    for name in (*_FUNCTIONS, *_LAYERS)
    if hasattr(holder, f"{name}_")
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
    ``forward(self, *args)`` runs it for any module that has tensors of these names, ``no_grad``
    where no gradient is recorded and nothing looks on.
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
        object.__setattr__(self, "forward", generate_forward(self.runs, self.label))

    @property
    def runs(self) -> fx.Graph:
        """The graph that is run."""
        return self.graph if self.running is None else self.running

    @cached_property
    def no_grad(self) -> Callable[..., Any]:
        """The forward without gradients, made when a call first needs it."""
        return generate_forward(no_grad_form(self.runs), f"{self.label}, no gradients")

    def rewritten(self, label: str, graph: fx.Graph, running: fx.Graph | None = None) -> Program:
        """A program of the same block with another graph."""
        return Program(label, graph, self.kind, self.modules, self.tensors, self.home, running)

    @property
    def code(self) -> str:
        """The Python source of the forward."""
        return self.graph.python_code("self").src


CAUSAL: Any = object()
"""What attention is given for a mask that masks nothing but what comes later."""
_CORE = torch._C._nn.scaled_dot_product_attention


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **others: Any,
) -> Tensor:
    """Attention with a mask, or ``CAUSAL``; one that may be converted is converted once."""
    if mask is CAUSAL:
        return _CORE(q, k, v, None, dropout_p, True, **others)
    plain = is_plain_call((q, k, v))  # asked first: a compiler cannot look for the attribute
    converted = getattr(mask, "converted", None) if plain else None
    if converted is not None and mask.is_cpu:
        if q.dtype not in converted:
            least = torch.full((), float("-inf"), dtype=q.dtype)
            converted[q.dtype] = torch.where(mask, torch.zeros((), dtype=q.dtype), least)
        mask = converted[q.dtype]
    return _CORE(q, k, v, mask, dropout_p, is_causal, **others)


def generate_forward(graph: fx.Graph, label: str) -> Callable[..., Any]:
    """The function that runs ``graph``; ``self`` provides its tensors and nested blocks."""
    python = graph.python_code("self")
    scope = dict(python.globals)
    scope["_attend"] = attend
    source = with_loops(_with_reads(python.src, graph), scope)
    source = _with_bindings(_with_regions(source, scope))
    exec(compile(source, f"<peftsurgery {label}>", "exec"), scope)
    forward: Callable[..., Any] = scope["forward"]
    return forward


def _with_reads(source: str, graph: fx.Graph) -> str:
    """The source with each part looked up once, and what it holds read from its own tables.

    Modules look up what they hold by a function of Python, which takes as long as a small operator.
    What is in no table (the parametrised, the pruned) is read by name, as ever.
    """
    reads = {n.name: n for n in graph.nodes if n.op in ("get_attr", "call_module")}
    lines, known = list[str](), {"": "self"}

    def held(part: str, table: str, name: str) -> str:
        """How to read what a part holds; its table is looked up once."""
        place = f"{table}_{part}"
        if place not in known:
            known[place] = place
            lines.append(f"    {place} = {part}.{table}")
        return f'{place}["{name}"] if "{name}" in {place} else getattr({part}, "{name}")'

    for line in source.splitlines():
        name, _, code = line.strip().partition(" = ")
        read = _by_name(str(reads[name].target)) if name in reads else ""
        if not read or not code.startswith(read):
            lines.append(line)
            continue
        holder, _, leaf = str(reads[name].target).rpartition(".")
        for path in _paths(holder):
            if path not in known:
                around, _, part = path.rpartition(".")
                code_of_part = held(known[around], "_modules", part)
                known[path] = f"part_{len(known)}"
                lines.append(f"    {known[path]} = {code_of_part}")
        table = "_parameters" if reads[name].op == "get_attr" else "_modules"
        found = held(known[holder], table, leaf)
        lines.append(f"    {name} = ({found}){code[len(read) :]}")
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


def _with_bindings(source: str) -> str:
    """The source with torch's own functions and methods for operators that have them.

    They reach the same operators, and bind their arguments in a third of the time.
    """

    def binding(found: re.Match[str]) -> str:
        name, overload = found.groups()
        if name == "to" and _FORMAT.search(source, found.end(), source.find("\n", found.end())):
            return found[0]  # the method takes it by its name alone
        return BINDINGS.get(name) or BINDINGS.get(f"{name}.{overload}") or found[0]

    source = _SLICE.sub(_indexed, _MASKED.sub("_attend", source))
    source = _REMEMBERED.sub(r"\1[\2]", source)
    return _OPERATOR.sub(binding, source)


def _indexed(found: re.Match[str]) -> str:
    """A slice by Python's own index, which makes the same view in half the time."""
    name, dim, start, end = found.groups()
    bounds = ("" if start in ("None", "0") else start, "" if end in ("None", _END) else end)
    return f"{name}[{':, ' * int(dim)}{':'.join(bounds)}]"


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
