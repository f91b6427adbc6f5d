"""No site, role or fact depends on the sizes of the inputs that a model was captured with."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.anatomy import analysis, survey, values
from peftsurgery.anatomy import fused_rows as rows
from peftsurgery.capture import Capture
from tests.models.captured import captured
from tests.models.zoo import ZOO

EXAMPLES = ((2, 7), (2, 2), (3, 16))


def described(capture: Capture) -> list[str]:
    """Everything that rules may ask of the sites of a capture."""
    return [
        f"{s} {s.kind} {s.role} {s.module} {s.parameter} {s.layer} {s.slice} {s.site.turned} "
        f"{s.type} {sorted(s.facts.items(), key=str)} {sorted(s.site.nodes)}"
        for s in survey(capture)
    ]


@pytest.mark.parametrize("name", ["bert", "transformer_encoder", "vit"])
def test_sites_roles_and_facts_are_those_of_any_example(name: str) -> None:
    made = [described(captured(name).base_capture)]
    for sizes in EXAMPLES[1:]:
        made.append(described(ps.capture(ZOO[name].build(), ZOO[name].inputs(*sizes)).base_capture))
    assert made[0] == made[1] == made[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_a_graph_is_read_alike_whatever_its_example_measured(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = captured(name).base_capture
    expected = described(capture)
    for batch, other in ((2, 2), (3, 5)):

        def pretended(size: Any, batch: int = batch, other: int = other) -> int:
            """The size if every symbol but the first in the alphabet had another value."""
            if not isinstance(size, torch.SymInt):
                return int(size)
            symbols = sorted(size.node.expr.free_symbols, key=str)
            fixed = {s: r.lower for s in symbols if (r := _range(size, s)).is_singleton()}
            given = {s: batch if i == 0 else other for i, s in enumerate(symbols)}
            return int(size.node.expr.subs({**given, **fixed}))

        monkeypatch.setattr(analysis, "_known", WeakKeyDictionary())
        monkeypatch.setattr(values, "concrete", pretended)
        monkeypatch.setattr(rows, "concrete", pretended)
        assert described(capture) == expected


def _range(size: torch.SymInt, symbol: Any) -> Any:
    return size.node.shape_env.var_to_range[symbol]


class Tables(nn.Module):
    """Tokens, types and positions, added up; all that is known of them is what indexes them."""

    def __init__(self, types: int, given: bool) -> None:
        super().__init__()
        self.given = given
        self.words, self.kinds = nn.Embedding(50, 8), nn.Embedding(types, 8)
        self.places = nn.Embedding(32, 8)
        self.register_buffer("numbers", torch.arange(32).expand(1, -1), persistent=False)
        self.register_buffer("zeros", torch.zeros(1, 32, dtype=torch.long), persistent=False)
        self.head = nn.Linear(8, 50)

    def forward(self, tokens: Tensor, kind: Tensor) -> Tensor:
        places = self.get_buffer("numbers")[:, : tokens.shape[1]]
        held = self.get_buffer("zeros").expand(len(tokens), -1)
        kinds = kind if self.given else torch.gather(held, 1, places.expand(len(tokens), -1))
        y: Tensor = self.head(self.words(tokens) + self.kinds(kinds) + self.places(places))
        return y


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(
    ("types", "sizes"), [(2, (2, 2)), (16, (2, 7)), (32, (2, 4)), (40, (2, 9))]
)
def test_tables_are_told_apart_by_what_indexes_them(
    types: int, sizes: tuple[int, int], given: bool
) -> None:
    inputs = {"tokens": torch.ones(sizes).long(), "kind": torch.ones(sizes).long()}
    sites = survey(ps.capture(Tables(types, given), inputs).base_capture)
    roles = {site.module: site.role for site in sites if site.kind == "embedding"}
    wanted = {"words": "embed.tokens", "kinds": "embed.types", "places": "embed.positions"}
    assert roles == wanted


class Boxes(nn.Module):
    """Tokens, coordinates of theirs on a page, and kinds that are zeros of their shape."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.left, self.kinds = (nn.Embedding(n, 8) for n in (50, 100, 600))

    def forward(self, box: Tensor, tokens: Tensor) -> Tensor:
        kinds = torch.zeros(tokens.shape, dtype=torch.long, device=tokens.device)
        y: Tensor = self.words(tokens) + self.left(box[:, :, 0]) + self.kinds(kinds)
        return y


class Two(nn.Module):
    """Two tables of ids that are given: it can be told which is of tokens, and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.others, self.head = (
            nn.Embedding(50, 8),
            nn.Embedding(60, 8),
            nn.Linear(8, 50),
        )

    def forward(self, a: Tensor, tokens: Tensor) -> Tensor:
        y: Tensor = self.head(self.others(a) + self.words(tokens))
        return y


@pytest.mark.parametrize("length", [2, 70])
def test_tables_have_their_true_roles_or_none(length: int) -> None:
    tokens = torch.ones(2, length).long()
    boxes = ps.capture(Boxes(), {"box": tokens[..., None].expand(-1, -1, 4), "tokens": tokens})
    two = ps.capture(Two(), {"a": tokens, "tokens": tokens.clone()})
    found = [
        {s.module: s.role for s in survey(graph.base_capture) if s.kind == "embedding"}
        for graph in (boxes, two)
    ]
    assert found[0] == {"words": "embed.tokens", "left": None, "kinds": "embed.types"}
    assert found[1] == {"words": "embed.tokens", "others": None}
