"""Each clean-up pass takes out what it says, and the graph computes what it did."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from peftsurgery.capture import cleanup, ops
from peftsurgery.capture.pieces import join_pieces

aten = torch.ops.aten


class Body(nn.Module):
    """A function as a module."""

    def __init__(self, body: Callable[..., Tensor]) -> None:
        super().__init__()
        self.body = body

    def forward(self, *args: Tensor) -> Tensor:
        return self.body(*args)


def exported(body: Callable[..., Tensor], *args: Tensor) -> fx.GraphModule:
    """The flat graph of a function, as torch.export makes it before any clean-up."""
    module = torch.export.export(Body(body), args, strict=False).module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    module.graph.set_codegen(fx.graph.CodeGen())
    return module


def targets(module: fx.GraphModule) -> list[object]:
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


def run(module: fx.GraphModule, *args: Tensor) -> Tensor:
    found = fx.Interpreter(module).run(*args)
    result = found[0] if isinstance(found, tuple) else found
    assert isinstance(result, Tensor)
    return result


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        (lambda x: torch.sin(x.to(torch.float32)), [aten.sin.default]),
        (lambda x: torch.sin(aten.slice.Tensor(x, 1, 0, 2**63 - 1)), [aten.sin.default]),
        (lambda x: torch.sin(x.to(torch.float64)), [aten.to.dtype, aten.sin.default]),
        (lambda x: torch.sin(x[:, :2]), None),
        (lambda x: x.to(torch.float32, copy=True).add_(1) * x, None),
    ],
    ids=["a cast to its dtype", "a full slice", "a true cast", "a true slice", "a copy"],
)
def test_casts_and_slices_that_change_nothing_go(
    body: Callable[..., Tensor], kept: list[object] | None
) -> None:
    x = torch.randn(2, 3)
    module = exported(body, x)
    before = targets(module)
    cleanup.drop_assertions(module.graph)
    cleanup.drop_idle_casts(module.graph)
    found = [target for target in targets(module) if "assert" not in str(target)]
    assert found == ([t for t in before if "assert" not in str(t)] if kept is None else kept)
    torch.testing.assert_close(run(module, x), body(x), rtol=0, atol=0)


def test_arithmetic_in_place_becomes_ordinary_only_where_nothing_else_sees_it() -> None:
    def seen(x: Tensor) -> Tensor:
        y = torch.sin(x)
        part = y[:, :1]
        y.add_(1)  # `part` changes with it
        return y * part

    def unseen(x: Tensor) -> Tensor:
        return torch.sin(x).add_(1).mul_(2)

    x = torch.randn(2, 3)
    for body, ordinary in ((seen, False), (unseen, True)):
        module = exported(body, x)
        cleanup.make_functional(module.graph)
        assert (aten.add.Tensor in targets(module)) is ordinary
        assert (aten.add_.Tensor in targets(module)) is not ordinary
        torch.testing.assert_close(run(module, x), body(x), rtol=0, atol=0)


def test_a_sum_in_place_that_keeps_its_dtype_stays() -> None:
    """The ordinary sum of whole and fractional numbers is of another dtype."""

    def body(x: Tensor) -> Tensor:
        return x.to(torch.int64).mul_(2.0) if x.dtype == torch.int64 else x.half().add_(x)

    x = torch.randn(3)
    module = exported(body, x)
    cleanup.make_functional(module.graph)
    assert aten.add_.Tensor in targets(module)
    assert run(module, x).dtype == torch.float16


def test_a_train_flag_reads_the_mode_of_its_module() -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.25)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.drop(x), 0.5, self.training)

    module = torch.export.export(Dropped().train(), (torch.ones(8),)).module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    cleanup.follow_training(module.graph, frozenset(), frozenset({"drop"}))
    first, second = module.graph.find_nodes(op="call_function", target=aten.dropout.default)
    assert [str(getattr(a, "target", a)) for a in first.args[1:]] == ["drop.p", "drop.training"]
    assert [str(getattr(a, "target", a)) for a in second.args[1:]] == ["0.5", "training"]


def test_the_device_of_the_export_becomes_that_of_the_first_input() -> None:
    module = exported(lambda x: x + torch.arange(3, device=x.device), torch.randn(2, 3))
    cleanup.follow_device(module.graph)
    (counted,) = module.graph.find_nodes(op="call_function", target=aten.arange.default)
    assert counted.kwargs["device"].target is ops.device_of
    elsewhere = fx.Interpreter(module).run(torch.empty(2, 3, device="meta"))[0]
    assert elsewhere.device.type == "meta"


def test_each_user_of_a_tied_weight_reads_its_own_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.table(ids)))

    names = ("head.weight", "table.weight")
    module = torch.export.export(Tied(), (torch.tensor([1, 2]),)).module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    cleanup.name_by_user(module.graph, dict.fromkeys(names, names))
    read = {
        str(user.target): str(node.target)
        for node in module.graph.find_nodes(op="get_attr")
        for user in node.users
    }
    assert read == {"aten.embedding.default": "table.weight", "aten.linear.default": "head.weight"}


def test_what_nothing_uses_goes_unless_it_has_an_effect() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            torch.cos(x)
            self.seen.add_(1)
            return torch.sin(x)

    module = torch.export.export(Counted(), (torch.randn(3),)).module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    cleanup.drop_unused(module.graph)
    assert targets(module) == [aten.add_.Tensor, aten.sin.default]


def test_sizes_are_computed_before_all_else() -> None:
    module = torch.export.export(
        Body(lambda x: torch.sin(x).reshape(x.shape[0] * 3, 2)),
        (torch.randn(4, 6),),
        dynamic_shapes=(({0: torch.export.Dim.DYNAMIC},),),
    ).module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    cleanup.drop_assertions(module.graph)
    cleanup.sizes_first(module.graph)
    order = [str(target) for target in targets(module)]
    assert order.index("aten.sin.default") > max(
        number for number, target in enumerate(order) if "sym_size" in target or "mul" in target
    )
    assert run(module, torch.randn(5, 6)).shape == (15, 2)


def filled(x: Tensor) -> Tensor:
    made = x.new_empty(x.shape[0], 5)
    made[:, :2] = x[:, :2]
    made[:, 2:] = x[:, 1:4]
    return made.sin()


def filled_backwards(x: Tensor) -> Tensor:
    made = torch.zeros(x.shape[0], 5)
    made[:, -3:] = x[:, :3]
    made[:, :2] = x[:, 2:4]
    return made.sin()


def filled_in_part(x: Tensor) -> Tensor:
    made = x.new_zeros(x.shape[0], 5)
    made[:, :2] = x[:, :2]
    made[:, 3:] = x[:, 1:3]
    return made.sin()


def read_between(x: Tensor) -> Tensor:
    made = x.new_zeros(x.shape[0], 5)
    made[:, :2] = x[:, :2]
    early = made.sum()
    made[:, 2:] = x[:, 1:4]
    return made.sin() + early


def written_twice(x: Tensor) -> Tensor:
    made = x.new_zeros(x.shape[0], 5)
    made[:, :3] = x[:, :3]
    made[:, 2:] = x[:, 1:4]
    return made.sin()


def source_changed(x: Tensor) -> Tensor:
    source = x[:, :2].clone()
    made = x.new_empty(x.shape[0], 5)
    made[:, :2] = source
    source.mul_(0)
    made[:, 2:] = x[:, 1:4]
    return made.sin() + source.sum()


def cast_on_the_way(x: Tensor) -> Tensor:
    made = x.new_empty(x.shape[0], 5)
    made[:, :2] = x[:, :2].to(torch.float64)
    made[:, 2:] = x[:, 1:4]
    return made.sin()


def one_for_all(x: Tensor) -> Tensor:
    made = x.new_empty(x.shape[0], 5)
    made[:, :2] = x[:, :1]
    made[:, 2:] = x[:, 1:4]
    return made.sin()


@pytest.mark.parametrize(
    ("body", "is_joined"),
    [
        (filled, True),
        (filled_backwards, True),
        (filled_in_part, False),
        (read_between, False),
        (written_twice, False),
        (source_changed, False),
        (cast_on_the_way, False),
        (one_for_all, True),
    ],
)
def test_what_is_filled_piece_by_piece_is_concatenated(
    body: Callable[[Tensor], Tensor], is_joined: bool
) -> None:
    x = torch.arange(12.0).reshape(3, 4)
    module = exported(body, x)
    cleanup.drop_assertions(module.graph)
    join_pieces(module.graph)
    module.recompile()
    assert (aten.cat.default in targets(module)) is is_joined
    assert (aten.copy_.default in targets(module)) is not is_joined
    assert torch.equal(run(module, x), body(x))
