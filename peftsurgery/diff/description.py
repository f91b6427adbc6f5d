"""A model as data that two of can be compared: graphs by shape class, parameters, sites, config.

A description has no tensors and no fx nodes. Names in a shape class are relative to its block, so
that blocks of equal structure are described once. Two descriptions are of the same model if their
:func:`canonical` forms are equal, whatever their nodes are called and in whichever order.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Node:
    """One operation of a graph.

    ``op`` is an operator's name, or one of input, read, call, output. ``module`` is the path of the
    module whose forward made it; of a read the tensor's name, of a call the called block.
    ``operands`` are the keys of the nodes it takes; ``form`` are its arguments with ``%0``, ``%1``
    in the operands' places. ``surgery`` names the adapter that put it in, ``code`` the line of the
    model's source that it was captured from, which makes no difference.
    """

    op: str
    module: str
    operands: tuple[str, ...]
    form: str
    shape: str
    surgery: str = ""
    code: str = field(default="", compare=False)


@dataclass(frozen=True)
class TensorFacts:
    """A parameter or persistent buffer: ``tied`` is the first of the names it has."""

    dtype: str
    shape: tuple[int, ...]
    kind: str
    trained: bool = False
    tied: str = ""

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class SiteFacts:
    """What is known of a site: its kind, role, and facts, in words.

    ``bindings`` are the names a rule may use there and the nodes of its graph that they stand for,
    whose names make no difference.
    """

    kind: str
    role: str
    facts: tuple[tuple[str, str], ...] = ()
    bindings: tuple[tuple[str, str], ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Insertion:
    """What an adapter put at one site; ``sizes`` are the settings that its parameters' shapes read.

    ``module`` owns the site; ``parameters`` are the names of what was added, and of what is trained
    there, under its own name and under that of the adapter's copy. ``rule`` says what the rule
    matches, adds and computes, line by line.
    """

    adapter: str
    module: str
    role: str
    sizes: tuple[tuple[str, str], ...]
    parameters: tuple[str, ...]
    rule: tuple[str, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        inner = ", ".join(f"{name} {value}" for name, value in self.sizes)
        return f"{self.adapter}({inner})" if inner else self.adapter


@dataclass(frozen=True)
class ShapeClass:
    """The graph that blocks of one structure share, with the class name of their module.

    ``types`` are the class names of the modules in it, which make no difference by themselves.
    """

    kind: str
    nodes: Mapping[str, Node]
    types: Mapping[str, str] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Description:
    """A whole model. ``blocks`` names the shape classes of every block path ("" is the top)."""

    kind: str
    classes: Mapping[str, ShapeClass] = field(default_factory=dict)
    blocks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tensors: Mapping[str, TensorFacts] = field(default_factory=dict)
    sites: Mapping[str, SiteFacts] = field(default_factory=dict)
    insertions: Mapping[str, Insertion] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of nodes of the whole model, every block counted."""
        sizes = {label: len(each.nodes) for label, each in self.classes.items()}
        return sum(sizes[label] for labels in self.blocks.values() for label in labels)


def canonical(description: Description) -> Description:
    """The description with every shape class as an order-free, name-free value."""
    forms = {label: graph_form(each) for label, each in description.classes.items()}
    blocks: Any = {p: tuple(forms[x] for x in labels) for p, labels in description.blocks.items()}
    return replace(description, classes={}, blocks=blocks)


def graph_form(shape_class: ShapeClass) -> Hashable:
    """A value that is equal for graphs that differ in the names and order of nodes only.

    Every node stands as a hash of the tree that it is computed by, and equal trees are counted.
    """
    trees: dict[str, str] = {}
    for key, node in shape_class.nodes.items():
        inner = [trees[operand] for operand in node.operands]
        text = repr((node.op, node.module, node.form, node.shape, node.surgery, inner))
        trees[key] = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return shape_class.kind, frozenset(Counter(trees.values()).items())
