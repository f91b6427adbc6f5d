"""A refusal says which line of the model's own code it comes from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.errors import SurgeryError


class Deciding(nn.Module):
    """A module that goes by its values, behind one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.decided(x)

    def decided(self, x: Tensor) -> Tensor:
        if x.sum() > 1:
            return x
        return -x


def test_the_line_is_the_innermost_of_the_model() -> None:
    with pytest.raises(SurgeryError) as caught:
        ps.capture(Deciding(), {"x": torch.randn(2, 4)})
    lines = Path(__file__).read_text().splitlines()
    number = next(n for n, line in enumerate(lines, 1) if line.strip() == "if x.sum() > 1:")
    assert caught.value.code == "PSG228"
    assert f"(at test_model_lines.py:{number}: if x.sum() > 1:)" in caught.value.message


def test_a_statement_of_several_lines_is_told_whole() -> None:
    class Long(Deciding):
        def decided(self, x: Tensor) -> Tensor:
            return x.view(
                int(x.sum()),
                -1,
            )

    with pytest.raises(SurgeryError, match=r"PSG228.*int\(x.sum\(\)\)"):
        ps.capture(Long(), {"x": torch.randn(2, 4)})
