"""Where the positions of a text become numbers, on architectures that do it each in its own way."""

from __future__ import annotations

import pytest
import torch

import peftsurgery as ps
from peftsurgery.anatomy import survey
from tests.models.captured import captured
from tests.models.zoo import ZOO

# By what positions become numbers (transformers has changed the one or the other: any of several),
# the kind of the site, and whether the attention it is for is causal.
SITES = {
    "llama": {("to", "token", True)},
    "gpt2": {("embedding", "token", True)},
    "bert": {("embedding", "token", False)},
    "opt": {("embedding", "token", True)},
    "gptj": {("gather or index", "token", True)},
    "bloom": {("mul", "key", True)},
    "t5": {("sub", "key", False), ("sub", "key", True)},
    "bart": {("embedding", "token", False), ("embedding", "token", True)},
    "vit": set[tuple[str, str, bool]](),
}
SHIFTED = """
name: shifted
with: {steps: 5}
rules:
  - match: positions
    where: {kind: token}
    rewrite: {p: p + steps}
"""


@pytest.mark.parametrize("name", SITES)
def test_position_sites(name: str) -> None:
    sites = [site for site in survey(captured(name).base_capture) if site.kind == "positions"]
    found = {(site.facts["op"], site.facts["kind"], site.facts["causal"]) for site in sites}
    expected = [(ops.split(" or "), *facts) for ops, *facts in SITES[name]]
    assert len(found) == len(expected)
    assert all(any(op in ops and facts == rest for ops, *rest in expected) for op, *facts in found)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gptj"])
def test_positions_that_are_moved_are_those_a_caller_would_give(name: str) -> None:
    inputs = ZOO[name].inputs(3, 9)
    shifted = ps.apply(captured(name), ps.parse_rules(SHIFTED)).eval()
    positions = torch.arange(5, 14).expand(3, -1)
    with torch.no_grad():
        wanted = ZOO[name].build()(**inputs, position_ids=positions).logits
        torch.testing.assert_close(shifted(**inputs).logits, wanted, rtol=0, atol=1e-6)
