"""A causal mask is made if it masks a token; attention without one gives the same bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import peftsurgery as ps
from peftsurgery.capture.idle_masks import NeededMask, without_idle_masks
from peftsurgery.capture.program import CAUSAL, generate_forward
from tests.capture.pairs import Pair, assert_same, assert_same_gradients, dropping_llama, pair
from tests.models.zoo import ids

PADDED = [(0, 0), (0, 3), (1, 0)]
"""How many tokens are masked at the start, and at the end, of the first row."""


def _given(start: int, end: int, batch: int = 3, seq: int = 9) -> dict[str, Tensor]:
    mask = torch.ones(batch, seq, dtype=torch.long)
    mask[0, :start] = 0
    mask[0, seq - end :] = 0
    tokens = ids(batch, seq)
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens}


def _needed(graph: ps.GraphModel) -> list[NeededMask]:
    running = graph.captures[-1].top.running
    nodes = running.nodes if running is not None else ()
    return [node.target for node in nodes if isinstance(node.target, NeededMask)]


def _made(self: NeededMask, *values: Any) -> Any:
    """The mask, as the graph makes it whatever the tokens are."""
    return self.make(None, *values)


@pytest.mark.parametrize("padding", PADDED, ids=str)
@pytest.mark.parametrize("name", ["llama", "opt", "phi3", "mixtral"])
def test_loss_and_gradients_are_those_of_the_mask(
    name: str, padding: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    both, given = pair(name), _given(*padding)
    expected, actual = both.run(**given)
    assert _needed(both.graph)
    assert_same(expected, actual)
    actual.loss.backward()
    other = Pair(copy.deepcopy(both.graph), both.graph)
    other.original.zero_grad()
    monkeypatch.setattr(NeededMask, "__call__", _made)
    masked = other.original(**given)
    assert_same(masked, actual)
    masked.loss.backward()
    assert_same_gradients(other)


def test_dropout_draws_the_same() -> None:
    both = dropping_llama()
    both.train()
    for padding in PADDED:
        assert_same(*both.run(**_given(*padding), seed=7))


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_a_window_is_no_causal_mask(name: str) -> None:
    both = pair(name)
    for padding in PADDED:
        assert_same(*both.run(**_given(*padding)))


class Attending(nn.Module):
    """Attention of one head under a mask that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        parts = (part(x)[:, None] for part in (self.one, self.two, self.three))
        result: Tensor = x + F.scaled_dot_product_attention(*parts, attn_mask=mask)[:, 0]
        return result


class Near(nn.Module):
    """Two layers in which tokens see those that are at most two away."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attending() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1])
        mask = (at[None, None, :, None] - at[None, None, None, :]).abs() <= 2
        for layer in self.layers:
            x = layer(x, mask)
        return x


def test_a_window_to_both_sides_is_no_causal_mask() -> None:
    torch.manual_seed(0)
    model, x = Near().eval(), torch.randn(3, 9, 8)
    graph = ps.capture(model, {"x": x[:2, :5]})
    with torch.no_grad():
        assert torch.equal(graph(x), model(x))


def test_a_mask_is_told_from_one_that_masks_something() -> None:
    both = pair("llama")
    both.run(**_given(0, 0))
    (mask,) = _needed(both.graph)
    made = [mask(*_arguments(both, _given(*padding))) for padding in PADDED]
    assert made[0] is CAUSAL
    for value, padding in zip(made[1:], PADDED[1:], strict=True):
        seen = _given(*padding)["attention_mask"].bool()
        assert torch.equal(value, torch.ones(9, 9).tril().bool() & seen[:, None, None, :])


def _arguments(both: Pair, given: dict[str, Tensor]) -> list[Any]:
    """What the call of a mask in the top graph gets: its inputs, sizes and device."""
    running = both.graph.captures[-1].top.running
    assert running is not None
    (node,) = (each for each in running.nodes if isinstance(each.target, NeededMask))
    known = {"attention_mask": given["attention_mask"]}
    values = {"sym_size": None, "device_of": torch.device("cpu")}
    return [
        known.get(str(each.target))
        if each.op == "placeholder"
        else values["device_of"]
        if "device_of" in each.name
        else given[str(each.args[0])].shape[int(str(each.args[1]))]
        for each in node.all_input_nodes
    ]


def _kept(model: Any, given: dict[str, Tensor]) -> list[tuple[int, ...]]:
    """Shapes of the square masks that a call keeps for its backward pass, each memory once."""
    found: dict[int, tuple[int, ...]] = {}

    def keep(value: Tensor) -> Tensor:
        if value.shape[-2:] == (9, 9):
            found[value.untyped_storage().data_ptr()] = tuple(value.shape)
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        loss = model(**given).loss
    del loss
    return list(found.values())


def test_nothing_is_kept_of_a_mask_and_one_if_it_masks_something() -> None:
    operated = ps.apply(pair("llama").graph, "lora_all_linear")
    assert _kept(operated, _given(0, 0)) == []
    assert len(_kept(operated, _given(0, 2))) == 1


def test_a_prefix_keeps_its_mask() -> None:
    operated = ps.apply(pair("llama").graph, "prefix_tuning", length=2)
    assert not any(map(_needed, [operated]))
    given = _given(0, 2)
    del given["labels"]
    exact = ps.apply(pair("llama").graph, "prefix_tuning", length=2, exact=True)
    exact.load_state_dict(operated.state_dict())
    assert torch.equal(operated(**given).logits, exact(**given).logits)


def test_who_looks_on_sees_the_mask_made() -> None:
    both = pair("llama")
    expected, given = both.original(**_given(0, 0)).logits, _given(0, 0)
    with FlopCounterMode(display=False):
        assert torch.equal(both.graph(**given).logits, expected)
    batched = torch.func.vmap(lambda mask: both.graph(**{**given, "attention_mask": mask}).logits)
    masks = torch.stack([_given(*padding)["attention_mask"] for padding in PADDED])
    for found, padding in zip(batched(masks), PADDED, strict=True):
        assert torch.allclose(found, both.original(**_given(*padding)).logits, atol=1e-5)


def test_checkpointed_blocks_are_given_the_same() -> None:
    graph = pair("llama").graph.train()
    again = copy.deepcopy(graph)
    again.gradient_checkpointing_enable()
    for padding in PADDED:
        for model in (graph, again):
            model.zero_grad()
            model(**_given(*padding)).loss.backward()
        assert_same_gradients(Pair(graph, again))


def test_a_mask_that_something_else_reads_is_made() -> None:
    capture = pair("llama").graph.base_capture
    top = capture.top
    graph = type(top.graph)()
    graph.output(graph.graph_copy(top.graph, {}))
    mask = next(node for node in graph.nodes if node.name.startswith("expand"))
    (result,) = graph.find_nodes(op="output")
    result.args = ((*result.args[0], mask),)
    programs = {**capture.programs, "": (top.rewritten(top.label, graph),)}
    assert without_idle_masks(programs) is programs
    assert callable(generate_forward(graph, "test"))
