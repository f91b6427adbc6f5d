"""Sizes of images: free as far as torch.export gets on with them, else one for each capture."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import peftsurgery as ps
from peftsurgery.capture.free_sizes import LIMIT, TangledSizesError, check_sizes, dynamic_shapes


class Windows(nn.Module):
    """Windows of an image that is padded to whole ones, each as a row of a batch, several times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.first, self.times = nn.Conv2d(3, 4, 3, padding=1), times

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for size in range(3, 3 + self.times):
            x = F.pad(x, (0, -x.shape[3] % size, 0, -x.shape[2] % size))
            batch, channels, height, width = x.shape
            parted = x.view(batch, channels, height // size, size, width // size, size)
            rows = parted.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, size * size)
            x = rows.mean(-1).view(batch, height // size, width // size, channels).movedim(-1, 1)
        return x


def fixed(graph: ps.GraphModel) -> list[str]:
    """The conditions that fix the height or the width of the image."""
    axes = ("x.shape[2] ==", "x.shape[3] ==")
    return [text for text in graph.base_capture.conditions if text.startswith(axes)]


@pytest.mark.parametrize(("times", "is_fixed"), [(0, False), (1, False), (3, True)])
def test_images_are_of_one_size_where_their_sizes_are_tangled(times: int, is_fixed: bool) -> None:
    model = Windows(times).eval()
    graph = ps.capture(model, {"x": torch.randn(2, 3, 70, 80)})
    assert len(fixed(graph)) == (2 if is_fixed else 0)
    for size in ((70, 80), (121, 95)):
        x = torch.randn(3, 3, *size)
        assert torch.equal(graph(x), model(x))


class Unsolved(nn.Module):
    """A module that fails for an image whose sizes are free."""

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x.shape[2], int):
            raise ValueError("a size is no number")
        return x * x.shape[2]


def test_images_are_of_one_size_where_free_ones_fail() -> None:
    graph = ps.capture(Unsolved(), {"x": torch.randn(2, 3, 8, 8)})
    for size in (8, 6):
        x = torch.randn(4, 3, size, size)
        assert torch.equal(graph(x), x * size)


def test_a_size_of_much_arithmetic_is_refused() -> None:
    mode = torch._subclasses.FakeTensorMode(shape_env=ShapeEnv())
    free = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    size = mode.from_tensor(torch.zeros(50), symbolic_context=free).shape[0]
    with mode:
        check_sizes(torch.zeros(size + 1))
        with pytest.raises(TangledSizesError):
            check_sizes(torch.zeros(sum(size // step for step in range(2, LIMIT))))


def test_only_images_keep_their_sizes() -> None:
    tensors = {"image": torch.zeros(2, 3, 8, 8), "ids": torch.zeros(2, 7, 1, 1, dtype=torch.long)}
    shapes = dynamic_shapes(tensors, images_vary=False)
    assert set(shapes["image"]) == {0}
    assert set(shapes["ids"]) == {0, 1}
