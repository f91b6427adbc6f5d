"""What stands for a block is unfolded into what tracing the block makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models.blocks import Block, Stack
from tests.models.traces import compared


class Frozen(Block):
    """Computes a part of it without a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            place = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * x.mean()
        return super().forward(x) + place


class Cast(Block):
    """Computes a part of it under autocast, and begins with a cast."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.float64).to(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inner = self.inner(x)
        return super().forward(x) + self.outer(inner.float())


class Doubles(Block):
    """Changes what it is given, too."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        x.mul_(2)
        return y + x


class Chained(Block):
    """Gives the next one a second value, and takes it of the one before."""

    def forward(self, x: Any, before: Any = None) -> Any:
        y = super().forward(x)
        return y, (y * 3 if before is None else before + y)


class Chain(Stack):
    """Hands the second value on, or drops it but for the last."""

    hands_on = True

    def forward(self, x: Tensor) -> Any:
        value = None
        for block in self.blocks:
            x, value = block(x, value if self.hands_on else None)
        return x, value


class Ends(Chain):
    hands_on = False


class Stage(Block):
    """Blocks in a block."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.layers = nn.ModuleList(Block(0) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return super().forward(x)


class Still(Stack):
    """Calls its blocks without a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for block in self.blocks:
                x = block(x)
        return x


MODELS = (
    *((Stack, kind) for kind in (Frozen, Cast, Doubles, Stage)),
    *((Chain, Chained), (Ends, Chained), (Still, Block)),
)


@pytest.mark.parametrize(("model", "kind"), MODELS, ids=lambda kind: kind.__name__)
def test_what_stands_for_a_block_is_unfolded(model: Any, kind: Any) -> None:
    filled = compared(model(kind).train(), {"x": torch.randn(2, 3, 8)})
    assert {"blocks.2", "blocks.3"} <= set(filled)
