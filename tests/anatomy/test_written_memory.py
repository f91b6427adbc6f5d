"""Ids are followed through what writes them in place, and masks are not taken for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from peftsurgery.anatomy import survey
from peftsurgery.capture import capture


def written_into_zeros(ids: Tensor, mask: Tensor) -> Tensor:
    made = ids.new_zeros(ids.shape)
    made[:, 1:] = ids[:, :-1].clone()
    made[:, 0] = 1
    return made.masked_fill_(made == -100, 0)


def written_into_a_view_of_a_view(ids: Tensor, mask: Tensor) -> Tensor:
    made = torch.zeros_like(ids)
    left, _ = made.unsqueeze(0).split([3, ids.shape[1] - 3], dim=2)
    left[0].copy_(ids[:, :3])
    return made


def joined(ids: Tensor, mask: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(ids[:, :1]), ids[:, :-1]], dim=1)


def rolled(ids: Tensor, mask: Tensor) -> Tensor:
    return ids.roll(1, 1).masked_fill(mask, 0)


def chosen(ids: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, ids, torch.zeros_like(ids))


def put_by_index(ids: Tensor, mask: Tensor) -> Tensor:
    made = torch.zeros_like(ids)
    made[:, torch.arange(3)] = ids[:, :3]
    return made


def counted(ids: Tensor, mask: Tensor) -> Tensor:
    made = ids.new_zeros(ids.shape)
    made[:, 1:] = torch.arange(ids.shape[1] - 1)
    return made.masked_fill_(mask, 0)


class Looking(nn.Module):
    """A table whose ids are made by a function of ids and a mask."""

    def __init__(self, make: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.make = make
        self.table = nn.Embedding(50, 8)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = self.table(self.make(ids, mask))
        return y


@pytest.mark.parametrize(
    ("make", "role"),
    [
        (written_into_zeros, "embed.tokens"),
        (written_into_a_view_of_a_view, "embed.tokens"),
        (joined, "embed.tokens"),
        (rolled, "embed.tokens"),
        (chosen, "embed.tokens"),
        (put_by_index, "embed.tokens"),
        (counted, "embed.positions"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_table_has_the_role_of_what_is_written_into_its_ids(
    make: Callable[[Tensor, Tensor], Tensor], role: str
) -> None:
    ids = torch.randint(0, 50, (2, 7))
    graph = capture(Looking(make), inputs={"ids": ids, "mask": ids > 9})
    assert [s.role for s in survey(graph.captures[0]) if s.kind == "embedding"] == [role]
