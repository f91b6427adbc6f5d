"""Probes of roles on the original model, which know nothing of graphs.

Whoever changes values must leave the probabilities of their core as they are, and whoever changes
one token's query must change that token's probabilities alone. Probabilities are what softmax
returns while the original runs, in the order of the calls, or exponentials that sum to one. A model
may make a mask of values too (Doge), by a linear of no role: what such linears make is then held as
it was, so that what is left is what values are to their core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from peftsurgery.capture.prepared import without_fast_path

SOFTMAX = {torch.ops.aten._softmax.default, torch.ops.aten._safe_softmax.default}
AVERAGED = {"zaya"}
"""Types whose keys have queries averaged into them: one token's query changes what others see."""
AT_MOST = 6  # sites of a role that are probed in one model


class Probabilities(TorchDispatchMode):
    """Notes what every softmax over more than two axes returns, or what an exponential makes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if made_of_scores(func, made):
            self.found.append(made.clone())
        return made


def made_of_scores(func: Any, made: Any) -> bool:
    """Whether an operator's result is probabilities."""
    if not isinstance(made, Tensor) or made.dim() < 3:
        return False
    if func is torch.ops.aten.exp.default:  # of scores less the logarithm of their sum
        total = made.sum(-1)
        return torch.allclose(total, torch.ones_like(total), atol=1e-4)
    return func in SOFTMAX


def probabilities(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What every softmax of a call returns, in order."""
    torch.manual_seed(0)
    with (
        torch.no_grad(),
        without_fast_path(),  # in which torch's layers call no softmax
        sdpa_kernel(SDPBackend.MATH),
        Probabilities() as noted,
    ):
        model(**inputs)
    return noted.found


def first_change(before: list[Tensor], after: list[Tensor]) -> int | None:
    """The first probabilities that are others, by number."""
    pairs = enumerate(zip(before, after, strict=True))
    return next((i for i, (a, b) in pairs if not torch.equal(a, b)), None)


def misplaced(model: nn.Module, sites: Any, inputs: dict[str, Tensor]) -> list[str]:
    """The modules whose role the original contradicts."""
    before = probabilities(model, inputs)
    queries, values = (
        [place for place in sites.where(role=role) if place.attentions][:AT_MOST]
        for role in ("attn.q", "attn.v")
    )
    firsts: dict[Any, int] = {}
    wrong: list[str] = []
    for place in queries:
        with changed(model, place):
            first = first_change(before, probabilities(model, inputs))
        if first is None:
            if any(found.shape[-1] == 1 for found in before):
                continue  # to one key everything is given, whatever the query
            wrong.append(f"attn.q {place.module} changes no probabilities")
            continue
        firsts |= {core: min(first, firsts.get(core, first)) for core in place.attentions}
        with one_token(model, place) as tokens:
            after = probabilities(model, inputs)
        if getattr(getattr(model, "config", None), "model_type", None) in AVERAGED:
            continue
        # where features attend to features, no row is a token's
        if tokens() == before[first].shape[-2] and rows_changed(before[first], after[first]) > 1:
            wrong.append(f"attn.q {place.module} changes other tokens")
    for place in values:
        with changed(model, place):
            first = first_change(before, probabilities(model, inputs))
        last = max((firsts.get(core, -1) for core in place.attentions), default=-1)
        if first is not None and first <= last:
            with as_it_was(model, inputs, sites), changed(model, place):
                first = first_change(before, probabilities(model, inputs))
            if first is not None and first <= last:
                wrong.append(f"attn.v {place.module} changes probabilities")
    return wrong


def rows_changed(before: Tensor, after: Tensor) -> int:
    """The most rows that are others, in any of the matrices of two stacks."""
    return int((before != after).any(-1).flatten(0, -2).sum(-1).max())


def rows_of(site: Any) -> slice | Tensor:
    """The rows of a site's weight."""
    return slice(None) if site.slice is None else torch.tensor(list(site.slice.indices()))


@contextmanager
def changed(model: nn.Module, place: Any) -> Iterator[None]:
    """Random numbers added to a site's rows of its weight, for a while."""
    weight, rows = model.get_parameter(place.parameter), rows_of(place.site)
    kept = weight.detach().clone()
    held = weight.data.mT if "W" in place.site.turned else weight.data
    held[rows] += torch.randn_like(held[rows])
    try:
        yield
    finally:
        weight.data.copy_(kept)


@contextmanager
def as_it_was(model: nn.Module, inputs: dict[str, Tensor], sites: Any) -> Iterator[None]:
    """What linears without a role make is, for a while, what they made of a model as it is now."""
    known = {site.module for site in sites if site.role}
    linears = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in known]
    made: dict[nn.Module, list[Tensor]] = {linear: [] for linear in linears}
    noted = [m.register_forward_hook(lambda m, _, y: made[m].append(y.clone())) for m in linears]
    probabilities(model, inputs)
    for hook in noted:
        hook.remove()
    held = [m.register_forward_hook(lambda m, _, y: made[m].pop(0)) for m in linears]
    try:
        yield
    finally:
        for hook in held:
            hook.remove()


@contextmanager
def one_token(model: nn.Module, place: Any) -> Iterator[Callable[[], int]]:
    """A site's result changed at one token of the first row; says of how many, or 0 if of none."""
    done: list[int] = []
    rows = rows_of(place.site)

    def change(module: nn.Module, args: Any, made: Any) -> Any:
        if not done and isinstance(made, Tensor) and made.dim() == 3 and made.shape[1] > 2:
            done.append(made.shape[1])
            part = made[0, made.shape[1] // 2]
            part[rows] += 1 + torch.rand_like(part[rows])
        return made

    hook = model.get_submodule(place.module).register_forward_hook(change)
    try:
        yield lambda: sum(done)
    finally:
        hook.remove()
