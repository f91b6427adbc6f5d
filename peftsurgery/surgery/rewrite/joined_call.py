"""The call of a joined operation in a program, which takes its tensors in a row.

    joined_linears(x, W, A, B)   ->   few rows without gradients:  W x + s B (A x), written out
                                      all else:                    :mod:`.joined_linears`

A decoding step takes as long as the calls that it is made of, and not as what they compute. So for
few rows the terms one by one are traced once, and run as plain calls of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.proxy import GraphAppendingTracer

from peftsurgery.capture.program import generate_forward
from peftsurgery.surgery.rewrite.joined_linears import (
    JoinedInputs,
    Term,
    joined_linears,
    one_by_one,
)

FEW = 16
"""Rows up to which what is computed costs less than the calls that compute it."""


class JoinedCall:
    """A joined operation, as a graph's node calls it: with x and the other tensors there are.

    It returns the results, (..., out) each, with all terms added to them.
    """

    __name__ = "joined_linears"

    def __init__(
        self, places: JoinedInputs, terms: Sequence[Term], compute: torch.dtype | None
    ) -> None:
        """``places`` says for each tensor which of the given ones it is; None where there is none.

        The rest is as :func:`joined_linears` takes it.
        """
        self.places, self.terms, self.compute = places, tuple(terms), compute
        self.few = generate_forward(self._written_out(), "few_rows")

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The results for x, the first of ``tensors``, and the others."""
        if not torch.is_grad_enabled() and is_short(tensors[0]):
            few: tuple[Tensor, ...] = self.few(None, *tensors)
            return few
        return joined_linears(self.inputs(tensors), self.terms, self.compute)

    def inputs(self, values: Sequence[object]) -> JoinedInputs:
        """What is given, each in its place."""
        return self.places.filled([n if n is None else values[n] for n in self.places.row])

    def _written_out(self) -> fx.Graph:
        """The terms one by one, as a graph of the tensors."""
        graph = fx.Graph()
        tracer = GraphAppendingTracer(graph)
        places = {place for place in self.places.row if place is not None}
        names = [f"given_{place}" for place in sorted(places)]
        given = [fx.Proxy(graph.placeholder(name), tracer) for name in names]
        results: Any = one_by_one(self.inputs(given), self.terms, self.compute)
        graph.output(tuple(result.node for result in results))
        return graph


def is_short(x: Tensor) -> bool:
    """Whether x has so few rows that the number of calls counts, and not what they compute."""
    return not torch.compiler.is_compiling() and x.numel() <= FEW * x.shape[-1]
