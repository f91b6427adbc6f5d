"""Layouts: what rules see of weights and values, and the way back, against numpy's indexing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, fx

from peftsurgery.anatomy import Site, Slice
from peftsurgery.surgery.rewrite.layout import as_held, as_seen, disorient, orient, tokens_dim

PARTS = [None, Slice(4, 4, 12), Slice(1, 2, 4, 3)]


def linear(part: Slice | None, turned: bool) -> Site:
    held = frozenset({"W"}) if turned else frozenset[str]()
    return Site("linear", "m", None, "m.weight", {}, {}, slice=part, turned=held)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("part", PARTS, ids=str)
def test_a_weight_is_out_by_in_and_the_slice_alone(part: Slice | None, turned: bool) -> None:
    whole = torch.randn(12, 5)
    stored, site = whole.T.contiguous() if turned else whole, linear(part, turned)
    rows = list(range(12)) if part is None else part.indices()
    assert (orient(stored, site, "W").numpy() == whole.numpy()[rows]).all()
    new = torch.randn(len(rows), 5)
    expected = whole.numpy().copy()
    expected[rows] = new.numpy()
    back = disorient(stored, site, "W", new).numpy()
    assert (back == (expected.T if turned else expected)).all()


def core(shapes: dict[str, tuple[int, ...]], transposed: str) -> Site:
    graph, nodes = fx.Graph(), {}
    for name, shape in shapes.items():
        nodes[name] = graph.placeholder(name)
        nodes[name].meta["val"] = torch.empty(shape)
    facts = {"heads": 4, "kv_heads": 2, "head_dim": 8}
    return Site("attention", "m", None, None, nodes, facts, turned=frozenset(transposed))


def held(seen: Tensor, name: str, flat: bool, transposed: str) -> np.ndarray:
    """A (batch, heads, tokens, head_dim) value as a model may hold it."""
    value = seen.numpy()
    if name in transposed:
        value = np.swapaxes(value, -1, -2)
    return value.reshape(-1, *value.shape[2:]) if flat else value


@pytest.mark.parametrize("flat", [False, True], ids=["four axes", "batch and heads in one"])
@pytest.mark.parametrize("transposed", ["", "k", "vo", "kvo"])
def test_an_attention_site_has_one_layout(flat: bool, transposed: str) -> None:
    seen = {n: torch.randn(3, 2 if n in "kv" else 4, 5, 8) for n in "qkvo"}
    model = {n: torch.from_numpy(held(v, n, flat, transposed).copy()) for n, v in seen.items()}
    site = core({name: tuple(value.shape) for name, value in model.items()}, transposed)
    for name, value in seen.items():
        assert torch.equal(as_seen(site, name, model[name]), value)
        assert torch.equal(as_held(site, name, value), model[name])
        assert model[name].shape[tokens_dim(site, name)] == 5


def test_other_values_are_as_they_are() -> None:
    site, x = linear(None, False), torch.randn(2, 3)
    assert as_seen(site, "x", x) is as_held(site, "x", x) is x
