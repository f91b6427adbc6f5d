"""Splitting a flat graph into a top graph that calls block graphs.

A block is an element of a repeated ModuleList (or of a Sequential of equal parts that is not itself
inside a block). Lists may be nested: a stage of Swin is a block that calls its layers, which are
blocks. Every tensor a block reads from beneath its own path becomes its own; all else (hidden
states, masks, sizes, a weight that lives elsewhere) is passed in. Blocks whose graphs are equal get
the same :class:`Program`.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, cast

from torch import fx, nn

from peftsurgery.capture.module_calls import hand_on
from peftsurgery.capture.names import is_within, join
from peftsurgery.capture.node_copies import copy_node
from peftsurgery.capture.outlines import Outline
from peftsurgery.capture.parts import named_parts
from peftsurgery.capture.program import ModuleInfo, Program, TensorInfo
from peftsurgery.capture.stack import inherit, stack_paths


def block_paths(module: nn.Module) -> frozenset[str]:
    """The paths of all elements of repeated lists, in a model of any nesting."""
    paths: set[str] = set()
    for name, part in named_parts(module):
        if not isinstance(part, nn.ModuleList | nn.Sequential) or not _is_repeated(part):
            continue
        if isinstance(part, nn.Sequential) and _is_inside(name, paths):
            continue
        paths.update(join(name, key) for key, _ in part.named_children())
    return frozenset(paths)


def _is_repeated(parts: nn.ModuleList | nn.Sequential) -> bool:
    """Whether the elements are of one class, and each more than a linear or a norm by itself."""
    elements = list(parts)
    kinds = {type(element) for element in elements}
    return (
        len(kinds) == 1
        and len(elements) >= (2 if isinstance(parts, nn.Sequential) else 1)
        and all(_is_composed(element) for element in elements)
    )


def _is_composed(element: nn.Module) -> bool:
    """Whether a module has parts, or tensors for more than one: layers may use functions only."""
    return bool(element._modules) or len(element._parameters) > 2


def _is_inside(name: str, paths: Iterable[str]) -> bool:
    return any(is_within(name, path) for path in paths)


@dataclass
class Library:
    """The programs of one model by structure; equal structures are one program."""

    by_structure: dict[str, Program] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def copy(self) -> Library:
        """A library of the same programs, to which others are added."""
        return Library(dict(self.by_structure), dict(self.counts))

    def intern(
        self,
        outline: Outline,
        make: Callable[[], fx.Graph],
        kind: str,
        modules: Mapping[str, ModuleInfo],
        tensors: Mapping[str, TensorInfo],
        home: str,
    ) -> Program:
        """The program of this structure; if it is new, ``make`` its graph, for a block at ``home``.

        A graph that is made has the ``outline``.
        """
        structure = repr((kind, outline.lines, sorted(tensors.items()), sorted(modules)))
        known = self.by_structure.get(structure)
        if known is None:
            number = self.counts.get(kind, 0)
            self.counts[kind] = number + 1
            known = Program(f"{kind}.{number}", make(), kind, modules, tensors, home)
            self.by_structure[structure] = known
        return known


@dataclass(frozen=True)
class Span:
    """A span of the flat graph: ``path`` is the block whose call made it ("" for the model)."""

    path: str
    nodes: Sequence[fx.Node]
    inputs: Sequence[fx.Node]
    outputs: Sequence[Any]  # nodes; the model's own may be constants too
    single: bool  # whether the output is the one value itself


# What a span does, in order: a node, or the call of a nested block, which has that program.
_Steps = Sequence[fx.Node | tuple[Span, Program]]


class Splitter:
    """Splits one flat graph; ``programs`` fills with the program of every block path."""

    def __init__(
        self,
        blocks: frozenset[str],
        modules: Mapping[str, ModuleInfo],
        tensors: Mapping[str, TensorInfo],
        library: Library,
    ) -> None:
        self.blocks, self.modules, self.tensors = blocks, modules, tensors
        self.library = library
        self.beneath = _by_block(modules, blocks)
        self.programs: dict[str, list[Program]] = {}

    def split(self, graph: fx.Graph) -> Program:
        """The top program of ``graph``; its output is a flat tuple."""
        nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output", "get_attr")]
        outputs = cast("Sequence[Any]", graph.output_node().args[0])
        span = Span("", nodes, graph.find_nodes(op="placeholder"), outputs, single=False)
        return self.build(span)

    def build(self, span: Span) -> Program:
        """The program of a span; nested spans become calls."""
        steps: list[fx.Node | tuple[Span, Program]] = []
        for child, run in self.runs(span):
            if child is None:
                steps += run
            else:
                inner = self.span(child, run)
                steps.append((inner, self.build(inner)))
        outline = _outline(span, steps)
        described = self.describe_block(span.path, outline.reads)
        program = self.library.intern(outline, partial(_copied, span, steps), *described, span.path)
        known = self.programs.setdefault(span.path, [])
        if program not in known:
            known.append(program)
        return program

    def runs(self, span: Span) -> list[tuple[str | None, list[fx.Node]]]:
        """The span's nodes as runs in order, each of one nested block call or of no block."""
        owners = [self.owner(node, span.path) for node in span.nodes]
        runs = [
            (owner, [node for _, node in items])
            for owner, items in groupby(
                zip(owners, span.nodes, strict=True), key=lambda item: item[0]
            )
        ]
        seen = Counter(owner for owner, _ in runs if owner is not None)
        torn = {owner for owner, count in seen.items() if count > 1}
        return [
            (None if owner is None or owner in torn else owner[1], nodes) for owner, nodes in runs
        ]

    def owner(self, node: fx.Node, path: str) -> tuple[str, str] | None:
        """The nested block call that made ``node``: its call key and path, or None."""
        for key, inner in stack_paths(node):
            if (
                inner in self.blocks
                and inner != path
                and (not path or inner.startswith(f"{path}."))
            ):
                return key, inner
        return None

    def span(self, path: str, nodes: list[fx.Node]) -> Span:
        """The span of a nested call: what it takes from outside, what outside takes from it."""
        inside = set(nodes)
        inputs: dict[fx.Node, None] = {}
        for node in nodes:
            for source in node.all_input_nodes:
                is_own = source.op == "get_attr" and str(source.target).startswith(f"{path}.")
                if source not in inside and not is_own:
                    inputs[source] = None
        outputs = [n for n in nodes if any(user not in inside for user in n.users)]
        return Span(path, nodes, list(inputs), outputs, single=len(outputs) == 1)

    def describe_block(
        self, path: str, reads: Iterable[str]
    ) -> tuple[str, dict[str, ModuleInfo], dict[str, TensorInfo]]:
        """The class, the submodules and the tensors of a block, by names relative to it."""
        prefix = f"{path}." if path else ""
        tensors = {
            name: self.tensors[prefix + name] for name in reads if prefix + name in self.tensors
        }
        return self.modules[path].type, self.beneath[path], tensors


def _by_block(
    modules: Mapping[str, ModuleInfo], blocks: Iterable[str]
) -> dict[str, dict[str, ModuleInfo]]:
    """The submodules of the model and of each block, by names relative to it."""
    beneath: dict[str, dict[str, ModuleInfo]] = {"": {}, **{path: {} for path in blocks}}
    for name, info in modules.items():
        ends = [place for place, letter in enumerate(name) if letter == "."]
        if name:
            beneath[""][name] = info
        for end in ends:
            if (path := name[:end]) in beneath:
                beneath[path][name[end + 1 :]] = info
    return beneath


class Copier:
    """Copies nodes of a graph into one of their own, with names relative to the module at ``path``.

    ``inputs`` are the nodes that the new graph takes.
    """

    def __init__(self, path: str, inputs: Iterable[fx.Node]) -> None:
        self.graph, self.value_of = fx.Graph(), dict[fx.Node, fx.Node]()
        self.prefix = f"{path}." if path else ""
        for node in inputs:
            self.value_of[node] = self.graph.placeholder(node.name)
            self.value_of[node].meta.update(node.meta)

    def value(self, node: fx.Node) -> fx.Node:
        """The copy of ``node``; a tensor read is made here when it is first needed."""
        if node not in self.value_of and node.op == "get_attr":
            own = self.graph.create_node("get_attr", str(node.target).removeprefix(self.prefix))
            own.meta.update(node.meta)
            self.value_of[node] = own
        return self.value_of[node]

    def copy(self, node: fx.Node) -> None:
        """Copy a node, with the tensors that it reads, unless a call gives it already."""
        if node in self.value_of:
            return
        for source in node.all_input_nodes:
            self.value(source)
        made = self.value_of[node] = copy_node(self.graph, node, self.value)
        if made.op == "call_module":
            made.target = str(made.target).removeprefix(self.prefix)

    def take(self, call: fx.Node, outputs: Sequence[Any], single: bool) -> None:
        """Let a call stand for its one output, or picks of it for each; none reads a None."""
        for number, node in enumerate(outputs):
            if node is None:
                continue
            value = call
            if not single:
                value = self.graph.call_function(operator.getitem, (call, number))
                value.meta["val"] = node.meta.get("val")
                inherit(value, call)
            hand_on(node, value)
            self.value_of[node] = value

    def finished(self, outputs: Iterable[Any], single: bool) -> fx.Graph:
        """The graph, which returns these values, or the one value itself."""
        results = fx.map_arg(tuple(outputs), self.value)
        self.graph.output(results[0] if single else results)
        return self.graph

    def call(self, span: Span, program: Program) -> None:
        """Insert the call of a nested block, and the picks of its outputs if it has several."""
        inputs = tuple(self.value(node) for node in span.inputs)
        target = span.path.removeprefix(self.prefix)
        call = self.graph.create_node(
            "call_module", target, inputs, {"program": program.label}, name=target.replace(".", "_")
        )
        values = tuple(node.meta.get("val") for node in span.outputs)
        call.meta["val"] = values[0] if span.single else values
        call.meta["nn_module_stack"] = _outer_stack(span)
        self.take(call, span.outputs, span.single)


def _outline(span: Span, steps: _Steps) -> Outline:
    """What the graph of a span would say."""
    outline = Outline(span.path, span.inputs)
    for step in steps:
        if isinstance(step, fx.Node):
            outline.add(step)
        else:
            inner, program = step
            outline.call(inner.path, program.label, inner.inputs, inner.outputs, inner.single)
    outline.end(span.outputs, span.single)
    return outline


def _copied(span: Span, steps: _Steps) -> fx.Graph:
    """The graph of a span."""
    copier = Copier(span.path, span.inputs)
    for step in steps:
        if isinstance(step, fx.Node):
            copier.copy(step)
        else:
            copier.call(*step)
    return copier.finished(span.outputs, span.single)


def _outer_stack(span: Span) -> dict[str, tuple[str, str]]:
    stack: dict[str, tuple[str, str]] = span.nodes[0].meta.get("nn_module_stack") or {}
    return {key: entry for key, entry in stack.items() if not _is_inside(entry[0], [span.path])}
