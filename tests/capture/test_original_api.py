"""A checkpoint of a captured model has each tensor once, and gives each of its names back."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import peftsurgery as ps
from tests.models.captured import captured


class Tied(nn.Module):
    """A table that is read twice, two parameters that overlap in memory, and empty ones."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.table.weight
        whole = torch.randn(6)
        self.first, self.last = nn.Parameter(whole[:4]), nn.Parameter(whole[2:])
        self.none, self.nothing = nn.Parameter(torch.ones(0)), nn.Parameter(torch.ones(0))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.table(x) * self.first + self.last)
        return y + self.none.sum() + self.nothing.sum()


def tied() -> Any:
    torch.manual_seed(0)
    return ps.capture(Tied(), {"x": torch.tensor([[0, 1, 2]])})


@pytest.mark.parametrize("make", [tied, lambda: deepcopy(captured("gpt2"))])
def test_a_tensor_with_several_names_is_written_once_and_read_under_all(
    make: Any, tmp_path: Path
) -> None:
    model = make()
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert len(written) == len(wanted) - 1  # one tie
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(written)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    del written[next(iter(written))]
    if make is tied:
        with pytest.raises(RuntimeError, match="Missing key"):
            model.load_state_dict(written)
