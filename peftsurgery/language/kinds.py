"""Kinds of sites that a rule can match, with the names that each binds.

The values are what flows through the graph, the weights are what a fold can change, the sizes are
numbers known before the model runs. ``result`` is the value that a plain ``rewrite`` replaces.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peftsurgery.language.operators import Operator
from peftsurgery.language.site_functions.sequences import SEQUENCES
from peftsurgery.language.site_functions.sites import (
    ATTENTION,
    EXPERTS,
    LINEAR,
    POSITIONS,
    RESIDUAL,
)


@dataclass(frozen=True)
class Kind:
    """One kind of site, seen from the language: the names it binds, and what it lets rules call.

    ``steps`` are the values in the order in which they are computed: those of a later step are made
    of those before, and are not there yet when these are rewritten. ``optional`` values are None
    where a site has none, and are then not rewritten. ``outputs`` are the values that leave the
    model there. At a kind that ``is_inputs``, the model's own, new values may have other sizes than
    those they replace; at one that ``lengthens``, they may be of more tokens.
    """

    name: str
    doc: str
    steps: tuple[tuple[str, ...], ...] = ()
    weights: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    result: str | None = None
    optional: tuple[str, ...] = ()
    functions: Mapping[str, Operator] = field(default_factory=dict, compare=False, repr=False)
    outputs: tuple[str, ...] = ()
    is_inputs: bool = False
    lengthens: bool = False

    @property
    def values(self) -> tuple[str, ...]:
        """Names of the values that flow through the graph at a site."""
        return tuple(name for step in self.steps for name in step)

    @property
    def computes(self) -> str | None:
        """Name of the site's own output, its last value; None if it computes none."""
        return self.values[-1] if self.steps else None

    def beside(self, name: str) -> tuple[str, ...]:
        """The values that are computed in the same step as one of them."""
        return next((step for step in self.steps if name in step), ())

    def after(self, name: str) -> tuple[str, ...]:
        """The values that are computed after one of them; none for a weight."""
        numbers = [number for number, step in enumerate(self.steps) if name in step]
        first = numbers[0] + 1 if numbers else len(self.steps)
        return tuple(word for step in self.steps[first:] for word in step)

    @property
    def names(self) -> frozenset[str]:
        """Every name that a match of this kind binds."""
        return frozenset((*self.values, *self.weights, *self.sizes))


_SEQUENCE = ("embeds", "mask", "positions", "types", "labels")
_DECODER = tuple(f"decoder_{name}" for name in _SEQUENCE)
_CONVOLUTION = ("in", "out", "kernel", "stride", "padding", "dilation", "groups")

KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "linear",
            "a product with a weight matrix: y = x Wᵀ + b, W is (out, in); to rules that ask for "
            "roles or paths, also a convolution of single taps that has a role",
            (("x",), ("y",)),
            ("W", "b"),
            ("in", "out"),
            "y",
            functions=LINEAR,
        ),
        Kind(
            "experts",
            "a product with one matrix for each expert, that of the row: y = x Wᵀ + b, W is "
            "(experts, out, in), b is (experts, out)",
            (("x",), ("y",)),
            ("W", "b"),
            ("in", "out", "experts"),
            "y",
            functions=EXPERTS,
        ),
        Kind(
            "embedding",
            "rows of a table: y = W[x], x holds whole numbers, W is (in, out)",
            (("x",), ("y",)),
            ("W",),
            ("in", "out"),
            "y",
        ),
        Kind(
            "conv",
            "a convolution: W is (out, in // groups, *kernel), or (in, out // groups, *kernel) "
            "if it is transposed",
            (("x",), ("y",)),
            ("W", "b"),
            _CONVOLUTION,
            "y",
        ),
        Kind(
            "attention",
            "an attention core: o from queries q (projected from x), keys k, values v and a mask",
            (("x",), ("q", "k", "v", "mask"), ("o",)),
            (),
            ("heads", "kv_heads", "head_dim", "v_head_dim", "hidden", "layer"),
            "o",
            ("mask",),
            ATTENTION,
        ),
        Kind(
            "residual",
            "a sublayer's output h where it is added to the stream x, giving y",
            (("h", "x"), ("y",)),
            (),
            ("hidden",),
            "h",
            functions=RESIDUAL,
        ),
        Kind(
            "inputs",
            "what goes into the model: embeddings, what else it is given for every token, the "
            "answer for every text; and its logits. What is rewritten may become longer, and more",
            ((*_SEQUENCE, *_DECODER, "answer"), ("logits",)),
            ("W",),
            ("width", "vocabulary"),
            "embeds",
            (*_SEQUENCE[1:], *_DECODER, "answer"),
            SEQUENCES,
            ("logits",),
            is_inputs=True,
        ),
        Kind(
            "positions",
            "where positions p become numbers y: rows of a table, angles, biases of scores",
            (("p",), ("y",)),
            (),
            (),
            "y",
            functions=POSITIONS,
            lengthens=True,
        ),
        Kind("norm", "a normalisation of x to y", (("x",), ("y",)), ("W", "b"), ("hidden",), "y"),
        Kind(
            "parameter",
            "a parameter of the model: W is (rows, ..., columns), a vector both at once; what is "
            "made of it is what its readers see",
            (),
            ("W",),
            ("rows", "columns", "tied"),
        ),
    )
}


# `width` is what rules like to call a setting of their own
_FACTS = {"hidden": "width"}


def sizes_of(kind: Kind, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that a match binds, from its site's facts. No other fact is a name in a rule."""
    named = {size: _FACTS.get(size, size) for size in kind.sizes}
    return {size: facts[fact] for size, fact in named.items() if fact in facts}


def pattern_kind(names: tuple[str, ...]) -> Kind:
    """The kind of a pattern: its free names are bound, and ``y`` is the value it computes."""
    steps = (tuple(name for name in names if name != "y"), ("y",))
    return Kind("pattern", "a sub-graph that computes the pattern", steps, (), (), "y")
