"""What is done to a captured part from outside acts as on the original, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftsurgery as ps
from tests.capture.pairs import assert_same, pair_of


class Powered(nn.Module):
    """A number that has the name of a dropout's rate, and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.drop = 3.0, nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x) * self.p


def test_a_constant_of_any_name_is_refused_and_a_rate_is_followed() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), Powered())
    both = pair_of(module, (torch.randn(3, 4),))
    part = both.graph.get_submodule("1")
    with pytest.raises(ps.SurgeryError) as caught:
        part.p = 5.0
    assert caught.value.code == "PSG220"
    assert part.p == 3.0
    for each in (both.original, both.graph):
        each.get_submodule("1.drop").p = 0.9
    both.train()
    assert_same(*both.run(torch.randn(5, 4)))


ADDING: dict[str, Callable[[Any, nn.Module], Any]] = {
    "append": lambda parts, part: parts.append(part),
    "add_module": lambda parts, part: parts.add_module("2", part),
    "setattr": lambda parts, part: setattr(parts, "2", part),
}


@pytest.mark.parametrize("own", [True, False], ids=["a part of its own", "a new one"])
@pytest.mark.parametrize("name", ADDING)
def test_no_list_of_a_capture_is_longer_than_the_originals(own: bool, name: str) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    graph = ps.capture(module, {"input": torch.randn(3, 4)})
    part = graph.get_submodule("0") if own else nn.Linear(4, 4)
    with pytest.raises(ps.SurgeryError) as caught:
        ADDING[name](graph, part)
    assert caught.value.code == "PSG220"
    assert [path for path, _ in graph.named_children()] == ["0", "1"]
    x = torch.randn(5, 4)
    assert_same(module(x), graph(x))
