"""Rows with adapters of their own, run with fewer copies: what the program's text says."""

from __future__ import annotations

import operator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import peftsurgery as ps
from peftsurgery.capture.program import generate_forward
from peftsurgery.surgery.rewrite import row_products as rooms
from peftsurgery.surgery.rewrite.row_form import row_form
from peftsurgery.surgery.rewrite.row_products import all_rows, numbers_of
from tests.models.captured import captured
from tests.models.zoo import text

ATEN = torch.ops.aten


def taken_rows(tensors: list[Tensor], index: Tensor) -> Tensor:
    return rooms.taken_rows(tensors, index, numbers_of(index))


def product_of_rows(x: Tensor, tensors: list[Tensor], index: Tensor) -> Tensor:
    return rooms.product_of_rows(x, tensors, index, numbers_of(index))


def chosen_rows(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return rooms.chosen_rows(mask, new, old, all_rows(mask))


NUMBERS = ([0, 1, 2], [2, 2, 2, 0], [1], [])


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_rows_that_are_taken_are_those_of_the_stack(numbers: list[int], grad: bool) -> None:
    tensors = [torch.randn(3, 4, requires_grad=True) for _ in range(3)]
    tensors[1] = torch.randn(4, 3).t().requires_grad_()
    index = torch.tensor(numbers, dtype=torch.long)
    with torch.set_grad_enabled(grad):
        made = taken_rows(tensors, index)
    assert torch.equal(made, torch.stack(tensors).index_select(0, index))
    assert made.requires_grad == grad


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("limit", [0, 2**20], ids=["memory of its own", "memory that is kept"])
def test_products_of_rows_are_those_of_the_stack(
    numbers: list[int], dtype: torch.dtype, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms._KEPT, "LIMIT", limit)
    tensors = [torch.randn(5, 4, dtype=dtype, requires_grad=True) for _ in range(3)]
    tensors[1] = torch.randn(4, 5, dtype=dtype).t().requires_grad_()
    index, x = torch.tensor(numbers, dtype=torch.long), torch.randn(len(numbers), 2, 4, dtype=dtype)
    expected = x @ torch.stack(tensors)[index].transpose(-1, -2)
    assert product_of_rows(x, tensors, index).requires_grad
    for quiet in (torch.inference_mode, torch.no_grad):
        with quiet():
            first = product_of_rows(x, tensors, index)
            product_of_rows(x, tensors[::-1], index)
        assert torch.equal(first, expected)


def test_products_of_rows_of_several_threads_do_not_meet() -> None:
    index, x = torch.tensor([0, 1, 1, 0]), torch.randn(4, 1, 64)
    sets = [[torch.randn(64, 64) for _ in range(2)] for _ in range(4)]

    @torch.no_grad()
    def wrong(tensors: list[Tensor]) -> int:
        expected = x @ torch.stack(tensors)[index].mT
        made = (product_of_rows(x, tensors, index) for _ in range(200))
        return sum(not torch.equal(each, expected) for each in made)

    with ThreadPoolExecutor(4) as pool:
        assert not any(pool.map(wrong, sets))


@pytest.mark.parametrize("mask", [[True, True], [True, False], [False, False]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_chosen_as_by_where(mask: list[bool], dtype: torch.dtype) -> None:
    new, old = torch.randn(2, 3, 4, dtype=dtype), torch.randn(2, 3, 4)
    here = torch.tensor(mask).view(-1, 1, 1)
    expected = torch.where(here, new, old)
    with torch.no_grad():
        made = chosen_rows(here, new, old)
        narrow = chosen_rows(here, new[:1], old)
    assert made.dtype == expected.dtype
    assert torch.equal(made, expected)
    assert torch.equal(narrow, torch.where(here, new[:1], old))


def test_what_looks_on_sees_the_operators() -> None:
    tensors, index = [torch.randn(4), torch.randn(4)], torch.tensor([1, 0, 1])
    mask = torch.tensor([[True], [True]])
    new, old = torch.randn(2, 2, 4), torch.randn(2, 2, 4)
    with torch.no_grad():
        over = torch.func.vmap(lambda i: taken_rows(tensors, i))(index.view(1, 3))
        assert torch.equal(over[0], taken_rows(tensors, index))
        both = torch.func.vmap(chosen_rows, in_dims=(None, 0, 0))(mask, new, old)
        assert torch.equal(both, new)
        meta = taken_rows([t.to("meta") for t in tensors], index.to("meta"))
        assert meta.shape == (3, 4)
        compiled = torch.compile(taken_rows, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(tensors, index), taken_rows(tensors, index))
        pair, x = [torch.randn(5, 4), torch.randn(5, 4)], torch.randn(3, 2, 4)
        expected = product_of_rows(x, pair, index)
        over = torch.func.vmap(lambda each: product_of_rows(each, pair, index))(x[None])
        assert torch.equal(over[0], expected)
        compiled = torch.compile(product_of_rows, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x, pair, index), expected)


def test_a_value_that_is_written_later_is_no_alias() -> None:
    def graph(is_written: bool) -> fx.Graph:
        made = fx.Graph()
        mask, new, old = map(made.placeholder, ("mask", "new", "old"))
        node = made.call_function(ATEN.where.self, (mask, new, old))
        node.meta["surgery"] = "rows"
        result = made.call_function(ATEN.relu_.default, (node,)) if is_written else node
        made.output(result)
        return made

    for is_written in (True, False):
        values = torch.tensor([True, True]), torch.tensor([-1.0, 2.0]), torch.zeros(2)
        with torch.no_grad():
            made = generate_forward(row_form(graph(is_written)), "rows")(None, *values)
            expected = generate_forward(graph(is_written), "rows")(None, *values)
        assert torch.equal(made, expected)
        assert torch.equal(values[1], torch.tensor([-1.0, 2.0]))


def test_a_product_that_alone_reads_its_rows_takes_them_for_itself() -> None:
    for alone in (True, False):
        made = fx.Graph()
        x, one, two, index = map(made.placeholder, ("x", "one", "two", "index"))
        stack = made.call_function(ATEN.stack.default, ([one, two],))
        taken = made.call_function(ATEN.index_select.default, (stack, 0, index))
        taken.meta["surgery"] = "rows"
        turned = made.call_function(ATEN.transpose.int, (taken, -1, -2))
        product = made.call_function(ATEN.matmul.default, (x, turned))
        made.output(product if alone else (product, turned))
        form = row_form(made)
        assert any(node.target is rooms.product_of_rows for node in form.nodes) == alone
        values = torch.randn(3, 2, 4), *torch.randn(2, 5, 4), torch.tensor([1, 0, 1])
        with torch.no_grad():
            results = [generate_forward(g, "rows")(None, *values) for g in (form, made)]
        first, second = ([*each] if isinstance(each, tuple) else [each] for each in results)
        assert all(map(torch.equal, first, second))


def sums(site: int, graph: fx.Graph, x: fx.Node, rows: tuple[fx.Node, fx.Node]) -> fx.Node:
    """A linear of ``x`` with a rank-2 change for the rows that a mask has, of two adapters."""
    mask, index = rows
    old = graph.call_function(ATEN.linear.default, (x, graph.get_attr(f"w{site}")))
    made: fx.Node = x
    for side in "ab":
        pair = [graph.get_attr(f"{side}{number}{site}") for number in range(2)]
        stack = graph.call_function(ATEN.stack.default, (pair,))
        taken = graph.call_function(ATEN.index_select.default, (stack, 0, index))
        taken.meta["surgery"] = "rows"
        turned = graph.call_function(ATEN.transpose.int, (taken, -1, -2))
        made = graph.call_function(ATEN.matmul.default, (made, turned))
    new = graph.call_function(operator.add, (old, graph.call_function(operator.mul, (0.3, made))))
    view = graph.call_function(ATEN.view.default, (mask, (-1, 1, 1)))
    chosen = graph.call_function(ATEN.where.self, (view, new, old))
    chosen.meta["surgery"] = "rows"
    return chosen


@pytest.mark.parametrize("seq", [1, 3])
@pytest.mark.parametrize("ranks", [(2, 2), (2, 4)], ids=str)
@pytest.mark.parametrize("is_read", [False, True], ids=["read by none", "read elsewhere"])
def test_sums_of_several_sites_are_made_in_place_of_the_products(
    seq: int, ranks: tuple[int, int], is_read: bool
) -> None:
    holder, made = torch.nn.Module(), fx.Graph()
    x, mask, index = map(made.placeholder, ("x", "mask", "index"))
    chosen = []
    for site, rank in enumerate(ranks):
        shapes = {f"w{site}": (6, 4)}
        shapes |= {f"a{number}{site}": (rank, 4) for number in range(2)}
        shapes |= {f"b{number}{site}": (6, rank) for number in range(2)}
        for name, shape in shapes.items():
            holder.register_parameter(name, torch.nn.Parameter(torch.randn(shape)))
        chosen.append(sums(site, made, x, (mask, index)))
    olds = [node for node in made.nodes if node.target is ATEN.linear.default]
    made.output((*chosen, *olds) if is_read else tuple(chosen))
    form = row_form(made)
    targets = [node.target for node in form.nodes]
    assert targets.count(rooms.products_of_rows) == 1
    assert (rooms.sum_of_rows in targets) != is_read
    index, x = torch.tensor([1, 0, 1]), torch.randn(3, seq, 4)
    for mask in (torch.tensor([True, True, True]), torch.tensor([True, False, True])):
        given = holder, x, mask, index
        with torch.no_grad():
            ours, theirs = (generate_forward(g, "rows")(*given) for g in (form, made))
        trained = generate_forward(form, "rows")(*given)
        assert all(map(torch.equal, trained, theirs))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=4e-6)
        if not mask.all() or is_read:
            assert all(map(torch.equal, ours, theirs))


def test_matrices_of_other_dtypes_are_not_put_in_one_memory() -> None:
    index, x = torch.tensor([1, 0]), torch.randn(2, 1, 4)
    tensors = [torch.randn(3, 4).bfloat16(), torch.randn(3, 4)]
    with torch.no_grad():
        made = product_of_rows(x, tensors, index)
    assert torch.equal(made, x @ torch.stack(tensors)[index].mT)


def several(exact: bool) -> Any:
    graph: Any = captured("llama")
    for number, name in enumerate("abc"):
        torch.manual_seed(number)
        graph = ps.apply(graph, "lora_all_linear", name=name, exact=exact)
        for value in graph.learnt(name).values():
            value.data.normal_()
    return graph.eval()


def test_a_model_gives_what_its_text_says() -> None:
    ours, exact = several(False), several(True)
    for seq in (1, 5):
        batch: dict[str, Tensor] = text(4, seq)
        for names in (["a", "b", "c", "b"], ["c", "c", "c", "c"], [None, "a", None, "b"]):
            with torch.no_grad():
                made, expected = (m(**batch, adapters=names).logits for m in (ours, exact))
            torch.testing.assert_close(made, expected, rtol=0, atol=2e-5)
            trained = ours(**batch, adapters=names).logits
            assert torch.equal(trained, expected)
