"""A small decoder of plain modules, each part of which can be made otherwise."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftsurgery as ps

WIDTH, HEADS, WORDS = 8, 2, 11


@dataclass(frozen=True)
class Layer:
    """How one layer is made."""

    hidden: int = 12
    act: str = "silu"
    norm: str = "before"  # or "after", or "none"
    fused: bool = False
    causal: bool = True
    names: tuple[str, ...] = ("ln", "attn", "mlp")


@dataclass(frozen=True)
class Recipe:
    """How a model is made."""

    layers: tuple[Layer, ...] = (Layer(),) * 3
    tied: bool = True
    names: tuple[str, ...] = field(default=("embed", "layers", "head"))
    dtype: torch.dtype = torch.float32


class Attention(nn.Module):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.causal, self.fused = layer.causal, layer.fused
        if layer.fused:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        else:
            self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.o(mixed.transpose(1, 2).flatten(2))


class Perceptron(nn.Module):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, layer.hidden), nn.Linear(layer.hidden, WIDTH)
        self.act = {"silu": nn.SiLU(), "gelu": nn.GELU()}[layer.act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        norm = nn.LayerNorm(WIDTH) if layer.norm != "none" else nn.Identity()
        for name, part in zip(
            layer.names, (norm, Attention(layer), Perceptron(layer)), strict=True
        ):
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        norm, attention, perceptron = (getattr(self, name) for name in self.layer.names)
        after = self.layer.norm == "after"
        x = norm(x + attention(x)) if after else x + attention(norm(x))
        return x + perceptron(x)


class Decoder(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.names = recipe.names
        parts = (
            nn.Embedding(WORDS, WIDTH),
            nn.ModuleList(Block(layer) for layer in recipe.layers),
            nn.Linear(WIDTH, WORDS, bias=False),
        )
        for name, part in zip(recipe.names, parts, strict=True):
            self.add_module(name, part)
        if recipe.tied:
            getattr(self, recipe.names[2]).weight = getattr(self, recipe.names[0]).weight

    def forward(self, ids: Tensor) -> Tensor:
        embed, blocks, head = (getattr(self, name) for name in self.names)
        x = embed(ids)
        for block in blocks:
            x = block(x)
        return head(x)


def build(recipe: Recipe = Recipe()) -> nn.Module:
    """The module, from one seed."""
    torch.manual_seed(0)
    return Decoder(recipe).eval().to(recipe.dtype)


@cache
def captured(recipe: Recipe = Recipe()) -> ps.GraphModel:
    """The module captured, once in a session; not to be changed."""
    return ps.capture(build(recipe), inputs={"ids": torch.randint(WORDS, (2, 5))})
