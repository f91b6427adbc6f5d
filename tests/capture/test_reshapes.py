"""Views in a row or beside each other become one, where all entries keep their order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from peftsurgery.capture.reshapes import join_reshapes, join_slices
from tests.capture.test_cleanup import exported, run, targets

aten = torch.ops.aten
x = torch.randn(2, 1, 24)
y = torch.randn(2, 3, 24)


def joined(body: Callable[..., Tensor], *args: Tensor) -> fx.GraphModule:
    """The graph of a function after both passes."""
    module = exported(body, *args)
    join_slices(module.graph)
    join_reshapes(module.graph)
    module.recompile()
    return module


def halves(value: Tensor, last: int = 24) -> Tensor:
    return torch.cat([value[..., 8:last].neg(), value[..., :8]], -1)


@pytest.mark.parametrize(
    ("body", "given", "kept"),
    [
        (lambda v: v.view(2, 1, -1, 8).transpose(1, 2).sin(), x, ["reshape", "sin"]),
        (lambda v: v.view(2, 1, 3, 8).permute(0, 2, 1, 3).sin(), x, ["reshape", "sin"]),
        (
            lambda v: v.reshape(2, -1, 1, 8).transpose(1, 2).reshape(2, 1, -1).sin(),
            x,
            ["reshape", "sin"],
        ),
        (
            lambda v: v.transpose(0, 1).reshape(2, 24).sin(),
            torch.randn(2, 1, 24).transpose(1, 2).contiguous().mT,
            ["reshape", "sin"],
        ),
        (
            lambda v: v.view(2, 3, -1, 8).transpose(1, 2).sin(),
            y,
            ["reshape", "transpose", "sin"],
        ),
        (
            lambda v: v.transpose(1, 2).reshape(2, -1).sin(),
            y,
            ["transpose", "reshape", "sin"],
        ),
        (lambda v: v.view(torch.int32).bitwise_not(), y, ["view", "bitwise_not"]),
        (lambda v: v.view(2, 1, -1, 8).transpose(1, 2), x, ["reshape", "transpose"]),
    ],
    ids=[
        *("one axis of one", "permuted", "three in a row", "transposed first"),
        *("an axis of three", "entries move", "other numbers", "what is returned"),
    ],
)
def test_views_that_keep_the_order_are_one(
    body: Callable[..., Tensor], given: Tensor, kept: list[str]
) -> None:
    module = joined(body, given)
    assert [str(target).split(".")[1] for target in targets(module)] == kept
    assert torch.equal(run(module, given), body(given))


def test_a_view_that_something_else_reads_stays() -> None:
    def body(value: Tensor) -> Tensor:
        split = value.view(2, 1, 3, 8)
        return split.transpose(1, 2).sin() + split.cos().transpose(1, 2)

    module = joined(body, x)
    assert targets(module).count(aten.transpose.int) == 2
    assert torch.equal(run(module, x), body(x))


@pytest.mark.parametrize("given", [y, y[..., ::2].repeat_interleave(2, -1), y.mT.contiguous().mT])
def test_slices_that_are_all_of_a_value_are_split_at_once(given: Tensor) -> None:
    module = joined(halves, given)
    assert aten.slice.Tensor not in targets(module)
    assert torch.equal(run(module, given), halves(given))


@pytest.mark.parametrize(
    "body",
    [
        lambda value: halves(value, 20),
        lambda value: torch.cat([value[..., :9].sin(), value[..., 8:].cos()], -1),
        lambda value: torch.cat([value[..., ::2].sin(), value[..., 1::2].cos()], -1),
        lambda value: value[..., :24].sin(),
    ],
    ids=["some is left out", "some is in both", "every other entry", "one slice"],
)
def test_other_slices_stay(body: Callable[..., Tensor]) -> None:
    module = joined(body, y)
    assert aten.split_with_sizes.default not in targets(module)
    assert torch.equal(run(module, y), body(y))


def test_slices_of_slices_are_split_too() -> None:
    def body(value: Tensor) -> Tensor:
        first, second = value[..., :16], value[..., 16:]
        return torch.cat([second, first[..., 8:].neg(), first[..., :8]], -1)

    module = joined(body, y)
    assert targets(module).count(aten.split_with_sizes.default) == 2
    assert torch.equal(run(module, y), body(y))
