"""Modules that do unusual things are captured exactly: a table, each against the original."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.capture.pairs import Pair, assert_same, assert_same_gradients, pair_of


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(torch.tanh(self.one(x)))


class Shared(nn.Module):
    """One layer, called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer()])

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.layers[0](x)
        return x


class Twins(nn.Module):
    """One layer under two names, and in a list with another."""

    def __init__(self) -> None:
        super().__init__()
        layer = Layer()
        self.layers = nn.ModuleList([layer, Layer(), layer])
        self.again = layer

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.again(x)


class Torn(nn.Module):
    """Runs the first halves of all layers, then the second halves: no layer is called."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer.one(x)
        for layer in self.layers:
            x = layer.two(x)
        return self.layers[0](x)


class Foreign(nn.Module):
    """Blocks that read tensors which live elsewhere: a table outside, the neighbour's weight."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor, table: Tensor, other: nn.Linear) -> Tensor:
            return self.inner(x) + F.linear(x, table) + F.linear(x, other.weight)

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 4))
        self.blocks = nn.ModuleList(self.Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.blocks
        return second(first(x, self.table, second.inner), self.table, first.inner)


class Uneven(nn.Module):
    """Blocks that pass several values on, one of them unused, and a block nothing uses."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
            y = self.inner(x)
            return y, y * 2, y.relu(), 3

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, x: Tensor) -> dict[str, Any]:
        a, b, _, three = self.blocks[0](x)
        self.blocks[1](x)
        c, _, d, _ = self.blocks[2](a + b)
        return {"c": c, "d": d, "again": c, "x": x, "three": three, "w": self.blocks[0].inner.bias}


class Constants(nn.Module):
    """Tensors made in forward, and a plain attribute that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.linspace(0, 1, 4)
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.tensor([1.0, 2.0, 3.0, 4.0]) + self.plain + torch.arange(x.shape[1])[:, None]
        for layer in self.layers:
            x = layer(x) + torch.tensor(0.5)
        return x


class Complex(nn.Module):
    """A rotation by a table of complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turn", torch.polar(torch.ones(16, 2), torch.randn(16, 2)))

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (2, 2)))
        turn = self.get_buffer("turn")[: x.shape[1]]
        return torch.view_as_real(pairs * turn).flatten(-2)


class Views(nn.Module):
    """In-place changes of views, of a value that is used again, and with promotion."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = x.clone()
        y[:, 0] += 1
        y[..., 1:].mul_(2)
        z = x.sin()
        w = z.view(-1)
        z.add_(1)
        half = x.to(torch.bfloat16)
        half.mul_(x)
        counts = (x > 0).long()
        counts.add_(2)
        masked = (x * 1).masked_fill_(x < 0, -1.0)
        return y, w, z, half, counts, masked.clamp_(max=0.5)


class Counter(nn.Module):
    """Writes to its own buffers in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("calls").add_(1)
        self.get_buffer("mean").lerp_(x.detach().mean(dim=(0, 1)), 0.5)
        return x - self.get_buffer("mean")


class Norms(nn.Module):
    """Norms that use the batch's statistics in eval mode too, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.batch = nn.BatchNorm1d(4, track_running_stats=False)
        self.instance = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
        self.usual = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(1, 2)
        return self.usual(self.instance(self.batch(y))).transpose(1, 2)


class Drops(nn.Module):
    """Every kind of dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds = nn.ModuleList([nn.Dropout(0.5), nn.AlphaDropout(0.5), nn.RReLU()])
        self.channels = nn.Dropout1d(0.5)

    def forward(self, x: Tensor) -> Tensor:
        for kind in self.kinds:
            x = kind(x)
        return self.channels(F.feature_alpha_dropout(x, 0.5, self.training))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 3, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out, (hidden, _) = self.lstm(x)
        return out + hidden[-1][:, None]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, weights = self.core(x, x, x)
        return out, weights


class NoGradient(nn.Module):
    """A part without gradient, and a detached one."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 4)
        self.free = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.frozen(x).sigmoid()
        return self.free(x) * scale + self.frozen(x).detach()


class Autocast(nn.Module):
    """A part in lower precision."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Linear(4, 4)
        self.high = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.low(x)
        return self.high(y.float())


class Sequence(nn.Module):
    """A Sequential of equal parts is a list of blocks; one inside a block is not."""

    def __init__(self) -> None:
        super().__init__()
        inner = [nn.Sequential(Layer(), Layer()) for _ in range(2)]
        self.body = nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Identity(nn.Module):
    """Nothing at all."""

    def forward(self, x: Tensor) -> Tensor:
        return x


CASES: dict[str, Callable[[], nn.Module]] = {
    case.__name__: case
    for case in (
        Shared,
        Twins,
        Torn,
        Foreign,
        Uneven,
        Constants,
        Complex,
        Views,
        Counter,
        Norms,
        Drops,
        Recurrent,
        Attention,
        NoGradient,
        Autocast,
        Sequence,
        Identity,
    )
}


def made(name: str) -> Pair:
    torch.manual_seed(0)
    return pair_of(CASES[name](), {"x": torch.randn(2, 5, 4)})


def leaves(value: Any) -> list[Tensor]:
    found = torch.utils._pytree.tree_leaves(value)
    return [leaf for leaf in found if isinstance(leaf, Tensor) and leaf.requires_grad]


@pytest.mark.parametrize("name", CASES)
def test_it_is_exact_in_both_modes_with_gradients_and_buffers(name: str) -> None:
    both = made(name)
    for train, shape in ((True, (3, 7, 4)), (False, (4, 6, 4)), (True, (2, 3, 4))):
        both.train(train)
        x = torch.randn(shape)
        xs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        torch.manual_seed(0)
        expected = both.original(x=xs[0])
        torch.manual_seed(0)
        actual = both.graph(x=xs[1])
        assert_same(expected, actual)
        for found, value in ((expected, xs[0]), (actual, xs[1])):
            total = sum(leaf.float().square().sum() for leaf in leaves(found) if leaf is not value)
            if isinstance(total, Tensor):
                total.backward()
        assert_same(xs[0].grad, xs[1].grad)
        assert_same_gradients(both)
        buffers = dict(both.graph.named_buffers())
        for key, buffer in both.original.named_buffers():
            assert torch.equal(buffers[key], buffer), key


def test_a_layer_that_is_called_thrice_has_one_program() -> None:
    graph = made("Shared").graph
    assert len(graph.captures[0].programs["layers.0"]) == 1


def test_layers_that_are_not_called_are_inlined_where_they_are_torn() -> None:
    programs = made("Torn").graph.captures[0].programs
    assert set(programs) == {"", "layers.0"}


def test_a_captured_model_runs_under_autocast_as_the_original_does() -> None:
    both = made("Shared")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(*both.run(torch.randn(3, 6, 4)))
