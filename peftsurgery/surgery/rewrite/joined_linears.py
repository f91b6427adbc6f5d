"""Linears of one input, with what is added to their results, as one differentiable operation.

    y_i = x W_iᵀ + b_i + Σ s h Bᵀ        each h = x Aᵀ of the same x, or given

The sum is made in place of the product. The A's are stacked, so that x is read once for all of
them; in the backward pass the gradients of x are summed in one buffer, scales are put on the narrow
side (h has few columns, y has many), and a gradient of B is computed turned: a product with few
rows is faster than one with few columns. What is kept for it is x, once, and the h's.

Where something else than a plain call is going on (a transform, a trace, autocast, forward-mode
derivatives, subclasses of tensors) the terms are computed one by one, as a rule says them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from peftsurgery.capture.plain import is_plain_call
from peftsurgery.surgery.rewrite.dtypes import HALVES, has_number


class Term(NamedTuple):
    """One summand: ``scale`` times the product of a hidden value with a B, added to a result."""

    result: int
    hidden: int
    scale: float


@dataclass(frozen=True)
class JoinedInputs:
    """The tensors of one call, or one value for each of them.

    ``x`` is (..., in). A result starts as the product of x with its weight, (out, in), and bias,
    (out,) or None; or if its weight is None, as its start, (..., out), which is None otherwise.
    ``downs`` are (rank, in): they make the first hidden values of x; ``given`` are the others,
    (..., rank). ``ups`` are (out, rank), one a term.
    """

    x: Any
    weights: Sequence[Any]
    biases: Sequence[Any]
    starts: Sequence[Any]
    downs: Sequence[Any]
    given: Sequence[Any]
    ups: Sequence[Any]

    @property
    def row(self) -> list[Any]:
        """All values in a row, in the order of the fields."""
        return [self.x, *(value for group in self.groups for value in group)]

    @property
    def groups(self) -> tuple[Sequence[Any], ...]:
        """The fields that hold several values."""
        return self.weights, self.biases, self.starts, self.downs, self.given, self.ups

    def filled(self, row: Sequence[Any]) -> JoinedInputs:
        """The same fields with other values, which come in a row."""
        rest = iter(row)
        return JoinedInputs(next(rest), *([next(rest) for _ in group] for group in self.groups))


def joined_linears(
    inputs: JoinedInputs, terms: Sequence[Term], compute: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """The results of several linears of x, (..., out) each, with ``terms`` added to them.

    A term takes the up of its own number. With ``compute``, terms are computed and added in that
    dtype, and each sum is rounded to the dtype of x. Equal to the terms one by one, but for a few
    rounding errors.
    """
    tensors = [tensor for tensor in inputs.row if tensor is not None]
    if not (is_plain_call(tensors) and _fit(inputs, compute)):
        return one_by_one(inputs, terms, compute)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        empty = inputs.filled([None] * len(inputs.row))
        made: tuple[Tensor, ...] = _JoinedLinears.apply(empty, terms, compute, *inputs.row)
        return made
    return _forward(inputs, terms, compute)[0]


def one_by_one(
    inputs: JoinedInputs, terms: Sequence[Term], compute: torch.dtype | None
) -> tuple[Tensor, ...]:
    """The same results by plain operations: what :func:`joined_linears` is an optimisation of."""
    seen = inputs.x if compute is None else inputs.x.to(compute)
    hidden = [*_narrow(seen, inputs.downs), *inputs.given]
    results = [
        F.linear(inputs.x, weight, bias) if start is None else start
        for weight, bias, start in zip(inputs.weights, inputs.biases, inputs.starts, strict=True)
    ]
    dtypes = [result.dtype for result in results]
    if compute is not None:
        results = [result.to(compute) for result in results]
    for term, up in zip(terms, inputs.ups, strict=True):
        added = F.linear(hidden[term.hidden], up)
        results[term.result] = _plus(results[term.result], term.scale, added)
    if compute is not None:
        results = [result.to(dtype) for result, dtype in zip(results, dtypes, strict=True)]
    return tuple(results)


def _plus(total: Tensor, scale: float, added: Tensor) -> Tensor:
    """A sum with ``scale`` times another; torch would round a scale that no half precision has."""
    if all(has_number(dtype, scale) for dtype in HALVES):
        return torch.add(total, added, alpha=scale)
    return total + scale * added


def _narrow(x: Tensor, downs: Sequence[Tensor]) -> Sequence[Tensor]:
    """The products of x with each down; compiled, of one product: an export has ranks that vary."""
    if len(downs) < 2 or not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return [F.linear(x, down) for down in downs]
    return F.linear(x, _stacked(downs)).split([len(down) for down in downs], -1)


def _fit(inputs: JoinedInputs, compute: torch.dtype | None) -> bool:
    """Whether dtypes and shapes are those of the optimised form.

    x and the starts have one dtype, the terms the one that they are added in, and nothing is
    repeated along an axis that it does not have.
    """
    own, leading = inputs.x.dtype, inputs.x.shape[:-1]
    added = own if compute is None else compute
    wide, narrow = (*inputs.weights, *inputs.biases, *inputs.starts), (*inputs.downs, *inputs.ups)
    return (
        all(tensor is None or tensor.dtype == own for tensor in wide)
        and all(tensor.dtype == added for tensor in (*narrow, *inputs.given))
        and all(value is None or value.shape[:-1] == leading for value in inputs.starts)
        and all(value.shape[:-1] == leading for value in inputs.given)
    )


def _rows(value: Tensor) -> Tensor:
    """(..., n) as (rows, n)."""
    return value.reshape(-1, value.shape[-1])


def _stacked(downs: Sequence[Tensor]) -> Tensor:
    return downs[0] if len(downs) == 1 else torch.cat(list(downs))


def _forward(
    inputs: JoinedInputs, terms: Sequence[Term], compute: torch.dtype | None
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The results, and the hidden values of x side by side, (rows, sum of ranks)."""
    x = _rows(inputs.x)
    made = None
    hidden: list[Tensor] = []
    if inputs.downs:
        seen = x if compute is None else x.to(compute)
        made = seen @ _stacked(inputs.downs).t()
        hidden += made.split([len(down) for down in inputs.downs], 1)
    hidden += map(_rows, inputs.given)
    results = []
    for number in range(len(inputs.weights)):
        result = _start(inputs, number, x)
        flat = result.view(-1, result.shape[-1])
        added = flat if compute is None else flat.to(compute)
        for term, up in zip(terms, inputs.ups, strict=True):
            if term.result == number:
                added.addmm_(hidden[term.hidden], up.t(), alpha=term.scale)
        if compute is not None:
            flat.copy_(added)
        results.append(result)
    return tuple(results), made


def _start(inputs: JoinedInputs, number: int, x: Tensor) -> Tensor:
    """What a result starts as, in memory of its own: no view, so that it may be changed in place.

    ``x`` are the rows of the inputs' x.
    """
    weight, bias, start = inputs.weights[number], inputs.biases[number], inputs.starts[number]
    if start is not None:
        return torch.empty_like(start, memory_format=torch.contiguous_format).copy_(start)
    result = x.new_empty((*inputs.x.shape[:-1], len(weight)))
    flat = result.view(-1, len(weight))
    if bias is None:
        torch.mm(x, weight.t(), out=flat)
    else:
        torch.addmm(bias, x, weight.t(), out=flat)
    return result


class _JoinedLinears(torch.autograd.Function):
    """:func:`_forward` with a backward pass of its own."""

    @staticmethod
    def forward(
        ctx: Any,
        empty: JoinedInputs,
        terms: Sequence[Term],
        compute: torch.dtype | None,
        *row: Tensor | None,
    ) -> tuple[Tensor, ...]:
        results, made = _forward(empty.filled(row), terms, compute)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(made, *row)
        ctx.call = (empty, terms, compute)
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        empty, terms, compute = ctx.call
        made, *row = ctx.saved_tensors
        inputs, needed = empty.filled(row), ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():
            found = _differentiable(inputs, terms, compute, needed, gradients)
        else:
            found = _Gradients(inputs, terms, compute, made, empty.filled(needed), gradients).run()
        return (None, None, None, *found)


def _differentiable(
    inputs: JoinedInputs,
    terms: Sequence[Term],
    compute: torch.dtype | None,
    needed: Sequence[bool],
    gradients: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients, by operations that have gradients themselves."""
    results = one_by_one(inputs, terms, compute)
    used = [(y, g) for y, g in zip(results, gradients, strict=True) if g is not None]
    wanted = [tensor for tensor, is_needed in zip(inputs.row, needed, strict=True) if is_needed]
    outputs, given = ([pair[i] for pair in used] for i in (0, 1))
    grad = torch.autograd.grad
    made = grad(outputs, wanted, given, create_graph=True, allow_unused=True) if used else ()
    found = iter(made or [None] * len(wanted))
    return [next(found) if is_needed else None for is_needed in needed]


class _Gradients:
    """The gradients of one call, of its tensors that need one."""

    def __init__(
        self,
        inputs: JoinedInputs,
        terms: Sequence[Term],
        compute: torch.dtype | None,
        made: Tensor | None,
        needed: Any,
        gradients: Sequence[Tensor | None],
    ) -> None:
        self.inputs, self.terms, self.compute, self.needed = inputs, terms, compute, needed
        self.gradients = [None if g is None else _rows(g) for g in gradients]
        self.x = _rows(inputs.x)
        self.made = made
        ranks = [len(down) for down in inputs.downs]
        own = () if made is None else made.split(ranks, 1)
        self.hidden = [*own, *map(_rows, inputs.given)]

    def run(self) -> list[Tensor | None]:
        """Gradients in the order of the tensors; None for those that need none."""
        inputs, needed = self.inputs, self.needed
        downs, given, ups = self.of_terms()
        x = self.of_x(downs) if needed.x else None
        weights = self.of_results(needed.weights, lambda g: g.t() @ self.x)
        biases = self.of_results(needed.biases, lambda g: g.sum(0))
        starts = self.of_results(needed.starts, lambda g: g)
        starts = [
            None if g is None else g.view(like.shape)
            for g, like in zip(starts, inputs.starts, strict=True)
        ]
        return [x, *weights, *biases, *starts, *self.of_downs(downs), *given, *ups]

    def of_results(
        self, needed: Sequence[bool], make: Callable[[Tensor], Tensor]
    ) -> list[Tensor | None]:
        """What ``make`` makes of the gradient of each result that has one, where it is needed."""
        pairs = zip(needed, self.gradients, strict=True)
        return [make(g) if wanted and g is not None else None for wanted, g in pairs]

    def of_terms(self) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
        """Gradients of the hidden values (of x side by side, of those given) and of the ups."""
        inputs, needed = self.inputs, self.needed
        count = len(inputs.downs)
        wants = [*([needed.x or any(needed.downs)] * count), *needed.given]
        whole = None if self.made is None or not wants[0] else torch.empty_like(self.made)
        narrow: list[Tensor | None] = [None] * len(self.hidden)
        if whole is not None:
            narrow[:count] = whole.split([len(down) for down in inputs.downs], 1)
        begun: set[int] = set()
        ups: list[Tensor | None] = [None] * len(self.terms)
        wide = [
            g if g is None or self.compute is None else g.to(self.compute) for g in self.gradients
        ]
        for number, (term, up) in enumerate(zip(self.terms, inputs.ups, strict=True)):
            g, hidden = wide[term.result], self.hidden[term.hidden]
            if g is None:
                continue
            if needed.ups[number]:
                ups[number] = torch.mm(hidden.t(), g).mul_(term.scale).t()
            if wants[term.hidden]:
                place = narrow[term.hidden]
                if place is None:
                    place = narrow[term.hidden] = torch.empty_like(hidden)
                beta = 1 if term.hidden in begun else 0
                torch.addmm(place, g, up, beta=beta, alpha=term.scale, out=place)
                begun.add(term.hidden)
        for index, place in enumerate(narrow):
            if place is not None and index not in begun:
                place.zero_()
        given = [
            None if value is None else value.view(like.shape)
            for value, like in zip(narrow[count:], inputs.given, strict=True)
        ]
        return whole, given, ups

    def of_downs(self, hidden: Tensor | None) -> Sequence[Tensor | None]:
        """Gradients of the downs, of one product."""
        downs = self.inputs.downs
        if hidden is None or not any(self.needed.downs):
            return [None] * len(downs)
        seen = self.x if self.compute is None else self.x.to(self.compute)
        found = (hidden.t() @ seen).split([len(down) for down in downs])
        return [g if wanted else None for g, wanted in zip(found, self.needed.downs, strict=True)]

    def of_x(self, hidden: Tensor | None) -> Tensor | None:
        """Gradient of x, of all that reads it, in one buffer; None if nothing does."""
        total: Tensor | None = None
        for weight, g in zip(self.inputs.weights, self.gradients, strict=True):
            if weight is None or g is None:
                continue
            total = g @ weight if total is None else total.addmm_(g, weight)
        if total is None:
            if hidden is None:
                return None
            total = torch.zeros_like(self.x)
        if hidden is not None:
            stacked = _stacked(self.inputs.downs)
            if self.compute is None:
                total.addmm_(hidden, stacked)
            else:
                total = total.to(self.compute).addmm_(hidden, stacked).to(self.x.dtype)
        return total.view(self.inputs.x.shape)
