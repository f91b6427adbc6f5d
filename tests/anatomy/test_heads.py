"""The head of a language model is told by what it says of every token, whatever its table has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.anatomy import survey


class Speaking(nn.Module):
    """Tokens in, numbers for each out; the table has more entries than there are tokens."""

    def __init__(self, entries: int, rows: int, prompts: int = 0, pools: bool = False) -> None:
        super().__init__()
        self.table, self.prompts, self.pools = nn.Embedding(entries, 8), prompts, pools
        self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, rows)

    def forward(self, input_ids: Tensor) -> Tensor:
        ids = input_ids
        if self.prompts:
            start = torch.arange(self.prompts).expand(len(ids), -1)
            ids = torch.cat([start, ids], 1)
        x = self.table(ids)
        x = x + torch.tanh(self.mix(x))
        x = x.mean(1) if self.pools else x[:, self.prompts :]
        y: Tensor = self.head(x)
        return y


@pytest.mark.parametrize(
    ("model", "role"),
    [
        (Speaking(40, 40), "lm_head"),
        (Speaking(40, 32), "lm_head"),
        (Speaking(40, 32, prompts=3), "lm_head"),
        (Speaking(40, 3), "head"),  # a label for every token
        (Speaking(40, 32, pools=True), "head"),  # one for the text
    ],
    ids=["as many", "fewer", "behind prompts", "labels", "pooled"],
)
def test_the_head_says_a_number_for_every_token(model: Speaking, role: str) -> None:
    graph = ps.capture(model, {"input_ids": torch.randint(0, 30, (2, 7))})
    roles = {s.module: s.role for s in survey(graph.base_capture) if s.kind == "linear"}
    assert roles["head"] == role
    adapted = {match["module"] for match in ps.apply(graph, "lora_all_linear").report.matches}
    assert ("head" in adapted) == (role == "head")
