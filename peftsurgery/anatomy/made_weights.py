"""Weights that are computed: of parameters, buffers and numbers alone, whatever the model is given.

    linear(x, W * g)              W and g are parameters, or g is a buffer
    linear(x, g * V / norm(V))    a normalised weight; or standardised, spectral, orthogonal
    linear(x, U @ V)              a product of two factors
    linear(x, W.view(out, in))    a stack of heads, seen as one matrix

A site binds what is computed as its ``W``. The parameter that it is named after is the one with
most numbers; the fact ``made_of`` has the names of all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx

from peftsurgery.anatomy.ops import Trait, has
from peftsurgery.anatomy.site import Site
from peftsurgery.anatomy.values import fixed, is_tensor, operands, shape, value
from peftsurgery.capture.stack import stack_paths

NO_WEIGHT = Trait.CONV | Trait.SOFTMAX | Trait.ATTENTION | Trait.PICK | Trait.CHOICE
"""What makes tables, codes and attended values of parameters, and no weights."""


class MadeWeights:
    """Values of a graph that parameters alone make, noted node by node in the graph's order."""

    def __init__(self, parameters: Collection[str]) -> None:
        """``parameters`` are the names of the tensors that may be weights."""
        self.parameters = parameters
        self.sources: dict[fx.Node, frozenset[fx.Node]] = {}

    def note(self, node: fx.Node) -> None:
        """Note a node that is no product of a signal with a weight."""
        if node.op == "get_attr":
            is_parameter = str(node.target) in self.parameters and is_tensor(node)
            self.sources[node] = frozenset((node,)) if is_parameter else frozenset()
        elif node.op == "call_function" and not has(node, NO_WEIGHT):
            read = operands(node)
            if read and all(source in self.sources for source in read):
                self.sources[node] = frozenset().union(*(self.sources[n] for n in read))

    def of(self, node: Any) -> tuple[fx.Node, ...]:
        """The parameters of which a matrix is made, that with most numbers first; or nothing."""
        found = self.sources.get(node, frozenset()) if isinstance(node, fx.Node) else frozenset()
        if not found or not _is_matrix(node):
            return ()
        return tuple(sorted(found, key=lambda n: (-value(n).numel(), str(n.target))))


def _is_matrix(node: fx.Node) -> bool:
    """Whether a value is a matrix of floating point numbers, of one size for every input."""
    found, sizes = value(node), [fixed(size) for size in shape(node)]
    is_computed = node.op == "call_function" and isinstance(found, torch.Tensor)
    return is_computed and found.is_floating_point() and len(sizes) == 2 and None not in sizes


def module_of(product: fx.Node, parameter: str) -> str:
    """The path of the module that multiplies with a weight made of a parameter.

    It is that in which the product was computed, if the parameter lies in it, at whatever depth;
    else the one that has the parameter.
    """
    owner = parameter.rpartition(".")[0]
    for _, path in stack_paths(product)[-1:]:
        names = path.split(".")
        ways = (".".join(names[start:]) for start in range(len(names)))
        return next((way for way in ways if f"{owner}.".startswith(f"{way}.")), owner)
    return owner


def made_of(site: Site) -> Mapping[str, tuple[str, ...]]:
    """The parameters that a site's computed weights are made of, by the name of the weight."""
    names = site.facts.get("made_of")
    return {"W": tuple(names)} if names else {}
