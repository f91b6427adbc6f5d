"""What a model keeps packed: what rules ask for, counted, read back, and given up again."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.language.settings import resolve_settings
from peftsurgery.surgery.fourbit.store import PackedWeights
from peftsurgery.surgery.plan.cut import Cut, Operation
from peftsurgery.surgery.plan.select import select_cuts

pytest.importorskip("bitsandbytes.functional")


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


@cache
def graph() -> ps.GraphModel:
    return ps.capture(Two(), {"x": torch.randn(2, 64)})


def cuts(rule: str) -> list[Cut]:
    file = ps.parse_rules(f"name: t\nrules: [{rule}]")
    found, _ = select_cuts(graph().base_capture, Operation(file, resolve_settings(file), "one"))
    return found


def settled(tensors: dict[str, Tensor], *rules: str) -> PackedWeights:
    """A model's packed weights, its tensors packed in place."""
    store = PackedWeights()
    made = [cut for rule in rules for cut in cuts(rule)]
    assert store.settle(made, graph()._captures.tensors, tensors.__getitem__) == []
    store.pack(tensors.__getitem__, tensors.__setitem__)
    return store


def tensors() -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in graph().named_parameters()}


def test_what_rules_store_is_packed_and_counted_and_the_rest_is_as_it_was() -> None:
    held, before = tensors(), tensors()
    store = settled(held, "{match: linear, where: {path: two}, store: nf4(64)}")
    assert store.packed == {"two.weight"}
    assert held["two.weight"].dtype == torch.uint8
    assert torch.equal(held["one.weight"], before["one.weight"])
    bytes_kept = held["two.weight"].numel()
    assert bytes_kept < before["two.weight"].numel() * 4 / 6
    assert store.hidden(held) == 64 * 128 - bytes_kept
    dense = store.dense("two.weight", held["two.weight"])
    assert (dense.shape, dense.dtype) == ((64, 128), torch.float32)
    # sixteen numbers in each block: half of the widest gap between them, times the largest
    assert float((dense - before["two.weight"]).abs().max()) <= 0.2 * float(dense.abs().max())


def test_what_is_stored_no_more_is_named_to_be_unpacked() -> None:
    held = tensors()
    store = settled(held, "{match: linear, store: nf4(64)}")
    further = PackedWeights(store)
    infos, read = graph()._captures.tensors, held.__getitem__
    wanted = cuts("{match: linear, where: {path: one}, store: nf4(64)}")
    wanted += cuts("{match: linear, where: {path: two}, store: fp4(64)}")
    assert further.settle(wanted, infos, read) == ["two.weight"]
    assert (further.packed, store.packed) == ({"one.weight"}, {"one.weight", "two.weight"})


def test_a_cast_of_the_model_is_that_of_what_is_read() -> None:
    held = tensors()
    store = settled(held, "{match: linear, where: {path: two}, store: nf4(64)}")
    assert store.casts(graph()._captures.tensors) == frozenset()
    store.cast(lambda tensor: tensor.to(torch.bfloat16))
    assert store.casts(graph()._captures.tensors) == {("two.weight", torch.bfloat16)}
    assert store.dense("two.weight", held["two.weight"]).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "rules",
    [
        ("{match: parameter, where: {kind: bias}, store: nf4()}",),
        ("{match: linear, store: nf4(64)}", "{match: linear, store: nf4(128)}"),
        (
            "{match: linear, store: nf4(64)}",
            "{match: parameter, where: {path: one.weight}, train: true}",
        ),
    ],
    ids=["no matrix", "in two ways", "trained"],
)
def test_what_cannot_be_stored_is_refused_by_name(rules: tuple[str, ...]) -> None:
    with pytest.raises(ps.SurgeryError, match=r"PSG325.*'one\."):
        settled(tensors(), *rules)
