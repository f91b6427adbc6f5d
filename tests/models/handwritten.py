"""Models no library knows: linears without nn.Linear, and the styles of small repositories."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def matrix(rows: int, columns: int) -> nn.Parameter:
    """A weight whose products keep the size of their input."""
    return nn.Parameter(torch.randn(rows, columns) * columns**-0.5)


class FunctionalLayer(nn.Module):
    """A pre-norm transformer layer of raw parameters, F.linear and F.scaled_dot_product_attention.

    The names say nothing: a1 a2 a3 a4 are query, key, value and output, m1 m2 m3 gate, up and down.
    """

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.a1, self.a2, self.a3, self.a4 = (matrix(width, width) for _ in range(4))
        self.m1, self.m2 = matrix(hidden, width), matrix(hidden, width)
        self.m3 = matrix(width, hidden)
        self.c4 = nn.Parameter(torch.zeros(width))
        self.n1 = nn.Parameter(torch.ones(width))
        self.n2 = nn.Parameter(torch.ones(width))

    def split(self, x: Tensor) -> Tensor:
        """(batch, seq, width) to (batch, heads, seq, head width)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.layer_norm(x, x.shape[-1:], self.n1)
        q = self.split(F.linear(h, self.a1))
        k = self.split(F.linear(h, self.a2))
        v = self.split(F.linear(h, self.a3))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.linear(mixed.transpose(1, 2).flatten(2), self.a4, self.c4)
        h = F.layer_norm(x, x.shape[-1:], self.n2)
        return x + F.linear(F.silu(F.linear(h, self.m1)) * F.linear(h, self.m2), self.m3)


class Functional(nn.Module):
    """Two functional layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.ModuleList(FunctionalLayer(32, 48, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.stack:
            x = layer(x)
        return x


class Mixer(nn.Module):
    """Norm, fused projection, softmax attention by hand, output projection; the caller adds."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first = nn.LayerNorm(width)
        self.into = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.into(self.first(x)).chunk(3, dim=-1)
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Feed(nn.Module):
    """Norm and a two-layer perceptron; the caller adds."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Preceded(nn.Module):
    """The residual additions are in the caller, as in many a small vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([Mixer(32, 4), Feed(32, 48)]) for _ in range(2))
        self.last = nn.Linear(32, 7)

    def forward(self, x: Tensor) -> Tensor:
        for pair in self.layers:
            assert isinstance(pair, nn.ModuleList)
            mix, feed = pair
            x = mix(x) + x
            x = feed(x) + x
        out: Tensor = self.last(x.mean(dim=1))
        return out


class TwoLists(nn.Module):
    """Mixers in one list, perceptrons in another: a block alone cannot see the residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(Mixer(32, 4) for _ in range(2))
        self.feeds = nn.ModuleList(Feed(32, 48) for _ in range(2))
        self.heads = nn.ModuleList(Feed(32, 48) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for mix, feed in zip(self.mixers, self.feeds, strict=True):
            x = x + mix(x)
            x = x + feed(x)
        first, second = self.heads
        out: Tensor = first(x) * second(x)
        return out
