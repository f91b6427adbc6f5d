"""The joined operation against the same terms one by one, by plain operations of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.nn import functional as F

from peftsurgery.surgery.rewrite.joined_call import FEW, JoinedCall
from peftsurgery.surgery.rewrite.joined_linears import JoinedInputs, Term, joined_linears

Row = tuple[Tensor, ...]
TERMS = (Term(0, 0, 2.0), Term(1, 1, -0.5), Term(1, 2, 1), Term(2, 0, 0.25))
# x, two linears, the second with a bias, and a start; two downs, a hidden value, four ups
PLACES = JoinedInputs(0, (1, 2, None), (None, 3, None), (None, None, 4), (5, 6), (7,), range(8, 12))

CALLS = {
    compute: JoinedCall(PLACES, TERMS, compute) for compute in (None, torch.float32, torch.float64)
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def row(dtype: torch.dtype, compute: torch.dtype, leading: tuple[int, ...] = (2, 5)) -> Row:
    """x, two weights, a bias, a start, two downs, a hidden value, and ups for the four terms."""
    own = (*leading, 16), (16, 16), (24, 16), (24,), (*leading, 8)
    added = (3, 16), (2, 16), (*leading, 4), (16, 3), (24, 2), (24, 4), (8, 3)
    made = [torch.randn(shape, dtype=dtype) for shape in own]
    made += [torch.randn(shape, dtype=compute) for shape in added]
    return tuple(value.requires_grad_() for value in made)


def joined(*row: Tensor, compute: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """Three results of one call: a linear, one with a bias, and one with a start of its own."""
    return CALLS[compute](*row)


def plain(*row: Tensor, compute: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """The same, written down."""
    x, one, two, bias, start, down, other, given, *ups = row
    seen = cast(x, compute)
    first = cast(F.linear(x, one), compute) + 2.0 * F.linear(F.linear(seen, down), ups[0])
    second = cast(F.linear(x, two, bias), compute)
    second = second - 0.5 * F.linear(F.linear(seen, other), ups[1]) + F.linear(given, ups[2])
    third = cast(start, compute) + 0.25 * F.linear(F.linear(seen, down), ups[3])
    results = first, second, third
    return results if compute is None else tuple(y.to(x.dtype) for y in results)


def cast(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value if dtype is None else value.to(dtype)


def gradients(results: tuple[Tensor, ...], wanted: Row) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in results]
    return torch.autograd.grad(results, wanted, given, allow_unused=True)


@pytest.mark.parametrize("leading", [(2, 5), (7,), (), (2, 3, 4), (0, 5)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "compute", "bound"),
    [
        (torch.float64, None, 1e-14),
        (torch.float32, None, 2e-6),
        (torch.float32, torch.float64, 1e-6),
        (torch.bfloat16, torch.float32, 1e-2),
        (torch.bfloat16, None, 3e-2),
    ],
    ids=str,
)
def test_results_and_gradients_are_those_of_the_terms_one_by_one(
    dtype: torch.dtype, compute: torch.dtype | None, bound: float, leading: tuple[int, ...]
) -> None:
    values = row(dtype, compute or dtype, leading)
    made, expected = joined(*values, compute=compute), plain(*values, compute=compute)
    for mine, theirs in pairs(made, expected):
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        close(mine, theirs, bound)
    for mine, theirs in pairs(gradients(made, values), gradients(expected, values)):
        assert mine.dtype == theirs.dtype
        close(mine, theirs, bound)


def pairs(mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(mine, theirs, strict=True)


def close(mine: Tensor, theirs: Tensor, bound: float) -> None:
    """The largest difference is at most ``bound`` of the largest value."""
    if theirs.numel():
        assert (mine - theirs).abs().max() <= bound * theirs.abs().max()


def test_bases_alone_keep_their_bits() -> None:
    x, one, two, bias, *_ = row(torch.float32, torch.float32)
    made = joined_linears(JoinedInputs(x, (one, two), (None, bias), (None, None), (), (), ()), ())
    assert torch.equal(made[0], F.linear(x, one))
    assert torch.equal(made[1], F.linear(x, two, bias))


def test_derivatives_of_derivatives() -> None:
    values = row(torch.float64, torch.float64, (3,))
    assert torch.autograd.gradcheck(joined, values)
    assert torch.autograd.gradgradcheck(joined, values)


@pytest.mark.parametrize("kept", range(12))
def test_only_what_needs_a_gradient_gets_one(kept: int) -> None:
    values = tuple(
        v.detach().requires_grad_(i == kept) for i, v in enumerate(row(*[torch.float64] * 2))
    )
    made = joined(*values)
    torch.autograd.backward(
        [y for y in made if y.requires_grad], [torch.ones_like(y) for y in made]
    )
    expected = torch.autograd.grad(sum(y.sum() for y in plain(*values)), values[kept])[0]
    assert [v.grad is not None for v in values] == [i == kept for i in range(12)]
    grad = values[kept].grad
    assert grad is not None
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_results_that_nothing_reads_are_left_out_of_the_backward_pass(
    used: tuple[int, ...],
) -> None:
    values = row(torch.float64, torch.float64)
    mine, theirs = (
        torch.autograd.grad(
            sum(f(*values)[i].square().sum() for i in used), values, allow_unused=True
        )
        for f in (joined, plain)
    )
    for one, other in zip(mine, theirs, strict=True):
        if other is None:
            assert one is None or not one.any()
        else:
            assert one is not None
            torch.testing.assert_close(one, other)


def test_gradients_that_arrive_are_left_as_they_are() -> None:
    values = row(torch.float32, torch.float32)
    given = [torch.ones_like(y) for y in joined(*values)]
    torch.autograd.grad(joined(*values), values, given)
    assert all(torch.equal(g, torch.ones_like(g)) for g in given)


def test_inputs_are_left_as_they_are() -> None:
    values = row(torch.float32, torch.float32)
    before = [value.detach().clone() for value in values]
    joined(*values)
    with torch.no_grad():
        joined(*values)
    assert all(torch.equal(value, old) for value, old in zip(values, before, strict=True))


def test_results_may_be_changed_in_place() -> None:
    values = row(torch.float64, torch.float64)
    first, second, third = joined(*values)
    a, b, c = plain(*values)
    mine = torch.autograd.grad((first.mul_(2).sum() + second.relu_().sum() + third.sum()), values)
    theirs = torch.autograd.grad((a * 2).sum() + b.relu().sum() + c.sum(), values)
    for one, other in pairs(mine, theirs):
        torch.testing.assert_close(one, other)


def test_layouts_of_every_kind() -> None:
    values = row(torch.float64, torch.float64, (4, 6))
    turned = tuple(
        v.detach().mT.contiguous().mT.requires_grad_() if v.ndim > 1 else v for v in values
    )
    for mine, theirs in pairs(joined(*turned), plain(*values)):
        torch.testing.assert_close(mine, theirs)
    for mine, theirs in pairs(
        gradients(joined(*turned), turned), gradients(plain(*values), values)
    ):
        torch.testing.assert_close(mine, theirs)


def test_other_dtypes_and_broadcasting_are_computed_as_torch_does() -> None:
    x, one, *_ = row(torch.float64, torch.float64)
    up, single = torch.randn(16, 4, dtype=torch.float64), torch.randn(1, 5, 4, dtype=torch.float64)
    call = JoinedCall(
        JoinedInputs(0, (1,), (None,), (None,), (), (2,), (3,)), [Term(0, 0, 3.0)], None
    )
    made = call(x, one, single, up)[0]
    torch.testing.assert_close(made, F.linear(x, one) + 3.0 * F.linear(single, up))
    mixed = call(x.float(), one.float(), single, up)
    assert mixed[0].dtype == torch.float64


def under_vmap(function: Callable[..., Any], values: Row) -> tuple[Tensor, ...]:
    x, *rest = values
    made: tuple[Tensor, ...] = torch.func.vmap(
        lambda x, s, g: function(x, *rest[:3], s, *rest[4:6], g, *rest[7:])
    )(x, rest[3], rest[6])
    return made


def under_grad(function: Callable[..., Any], values: Row) -> tuple[Tensor, ...]:
    made: tuple[Tensor, ...] = torch.func.grad(
        lambda row: sum(y.square().sum() for y in function(*row))
    )(values)
    return made


def under_jvp(function: Callable[..., Any], values: Row) -> tuple[Tensor, ...]:
    return torch.func.jvp(lambda *row: function(*row), values, values)[1]


def under_compile(function: Callable[..., Any], values: Row) -> tuple[Tensor, ...]:
    made = torch.compile(function, backend="aot_eager", fullgraph=True)(*values)
    return (*made, *gradients(made, values))


def under_checkpoint(function: Callable[..., Any], values: Row) -> tuple[Tensor, ...]:
    made = torch.utils.checkpoint.checkpoint(function, *values, use_reentrant=False)
    return (*made, *gradients(made, values))


def under_autocast(function: Callable[..., Any], values: Row) -> tuple[Tensor, ...]:
    with torch.autocast("cpu", torch.bfloat16):
        made = function(*values)
    return (*made, *gradients(made, values))


COMPILED = pytest.param(under_compile, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "way", [under_vmap, under_grad, under_jvp, COMPILED, under_checkpoint, under_autocast]
)
def test_what_looks_on_or_transforms_sees_plain_operations(way: Any) -> None:
    values = row(torch.float32, torch.float32, (3, 2))
    for mine, theirs in pairs(way(joined, values), way(plain, values)):
        close(mine, theirs, 2e-2 if way is under_autocast else 2e-6)


def test_forward_derivatives() -> None:
    values = row(torch.float64, torch.float64)
    with torch.autograd.forward_ad.dual_level():
        dual = [torch.autograd.forward_ad.make_dual(v.detach(), v.detach()) for v in values]
        mine, theirs = (
            [torch.autograd.forward_ad.unpack_dual(y).tangent for y in f(*dual)]
            for f in (joined, plain)
        )
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_on_the_meta_device() -> None:
    values = tuple(v.detach().to("meta").requires_grad_() for v in row(*[torch.float32] * 2))
    made = joined(*values)
    assert [y.shape for y in made] == [(2, 5, 16), (2, 5, 24), (2, 5, 8)]
    assert all(g.is_meta for g in gradients_on_meta(made, values))


def gradients_on_meta(made: tuple[Tensor, ...], values: Row) -> tuple[Tensor, ...]:
    return torch.autograd.grad(made, values, [torch.ones_like(y) for y in made])


@pytest.mark.parametrize("rows", [1, FEW, FEW + 1])
@pytest.mark.parametrize("compute", [None, torch.float32], ids=str)
def test_few_rows_without_gradients(rows: int, compute: torch.dtype | None) -> None:
    dtype = torch.float64 if compute is None else torch.bfloat16
    values = row(dtype, compute or dtype, (rows,))
    with torch.no_grad():
        made, expected = joined(*values, compute=compute), plain(*values, compute=compute)
    for mine, theirs in pairs(made, expected):
        assert mine.dtype == theirs.dtype
        close(mine, theirs, 1e-14 if compute is None else 1e-2)


def test_a_tensor_in_two_places_is_given_once() -> None:
    places = JoinedInputs(0, (1, 1), (None, None), (None, None), (2,), (), (3, 3))
    call = JoinedCall(places, [Term(0, 0, 1.0), Term(1, 0, 2.0)], None)
    shapes = (3, 8), (8, 8), (2, 8), (8, 2)
    x, weight, down, up = (torch.randn(*shape, dtype=torch.float64) for shape in shapes)
    added = F.linear(F.linear(x, down), up)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            one, two = call(x, weight, down, up)
        torch.testing.assert_close(one, F.linear(x, weight) + added)
        torch.testing.assert_close(two, F.linear(x, weight) + 2 * added)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [16 / 6, 16 / 8**0.5, 2.0])
def test_few_rows_in_half_precision_have_the_scale_and_not_a_rounded_one(
    dtype: torch.dtype, scale: float
) -> None:
    """The median of what is added, to what it is in float64: a rounded scale moves all of it."""
    places = JoinedInputs(0, (1,), (None,), (None,), (2,), (), (3,))
    call = JoinedCall(places, [Term(0, 0, scale)], None)
    x, zeros, down, up = (torch.randn(shape) for shape in ((4, 64), (999, 64), (8, 64), (999, 8)))
    given = [value.to(dtype) for value in (x, 0 * zeros, down, up)]
    with torch.no_grad():
        (found,) = call(*given)
        x, _, down, up = (value.double() for value in given)
        hidden = F.linear(*given[::2]).double()
    ratios = found.double() / (scale * hidden @ up.T)
    assert abs(ratios.median().item() - 1) < torch.finfo(dtype).eps / 20
