"""A stack of matrices, one for each expert, is a site however rows meet those of their experts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations import moe

import peftsurgery as ps
from peftsurgery.anatomy import survey
from tests.models.captured import captured

EXPERTS, IN, OUT, ROWS = 3, 4, 6, 4
IDS = torch.arange(EXPERTS).repeat_interleave(ROWS)
ENDS = torch.arange(1, EXPERTS + 1, dtype=torch.int32) * ROWS
Spelling = Callable[[Tensor, Tensor, Tensor], Tensor]


def batched(x: Tensor) -> Tensor:
    return x.unflatten(0, (EXPERTS, ROWS))


def grouped(x: Tensor, V: Tensor) -> Tensor:
    assert moe.torch  # the module that registers the operation
    return torch.ops.transformers.grouped_mm_fallback(x, V, ENDS)


def weighed(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """Every expert on every row, as a loop that leaves out the others by a weight of 0."""
    chosen = F.one_hot(IDS, EXPERTS).to(x.dtype)
    return sum(chosen[:, i, None] * F.linear(x, W[i], b[i]) for i in range(EXPERTS))


# W is (experts, out, in), b is (experts, out); the rows of an expert are one after the other.
SPELLINGS: dict[str, Spelling] = {
    "groups": lambda x, W, b: grouped(x, W.mT),
    "groups, a bias": lambda x, W, b: grouped(x, W.mT) + b[IDS],
    "batches": lambda x, W, b: torch.bmm(batched(x), W.mT).flatten(0, 1),
    "batches, a bias": lambda x, W, b: (batched(x) @ W.mT + b[:, None]).flatten(0, 1),
    "batches of columns": lambda x, W, b: (W @ batched(x).mT).mT.flatten(0, 1),
    "baddbmm": lambda x, W, b: torch.baddbmm(b[:, None], batched(x), W.mT).flatten(0, 1),
    "numbers": lambda x, W, b: torch.bmm(W[IDS], x[..., None]).squeeze(-1),
    "numbers, a bias": lambda x, W, b: (W[IDS] @ x[..., None])[..., 0] + b[IDS],
    "numbers, index_select": lambda x, W, b: (x[:, None] @ W.index_select(0, IDS).mT).squeeze(1),
    "a loop": lambda x, W, b: torch.cat([F.linear(batched(x)[i], W[i]) for i in range(EXPERTS)]),
    "a loop over rows and matrices": lambda x, W, b: torch.cat(
        [torch.mm(rows, matrix.T) for rows, matrix in zip(batched(x), W, strict=True)]
    ),
    "a loop of weighed outputs": weighed,
}
HELD_TURNED: dict[str, Spelling] = {
    "groups": lambda x, V, b: grouped(x, V) + b[IDS],
    "batches": lambda x, V, b: torch.bmm(batched(x), V).flatten(0, 1),
    "numbers": lambda x, V, b: torch.bmm(x[:, None], V[IDS]).squeeze(1) + b[IDS],
    "a loop": lambda x, V, b: torch.cat([batched(x)[i] @ V[i] + b[i] for i in range(EXPERTS)]),
}
CASES = [(p, False) for p in SPELLINGS.values()] + [(p, True) for p in HELD_TURNED.values()]
NAMES = [*SPELLINGS, *(f"{name}, (in, out)" for name in HELD_TURNED)]


class Stack(nn.Module):
    """One product."""

    def __init__(self, product: Spelling, turned: bool) -> None:
        super().__init__()
        self.product = product
        self.W = nn.Parameter(torch.randn(EXPERTS, *((IN, OUT) if turned else (OUT, IN))))
        self.b = nn.Parameter(torch.randn(EXPERTS, OUT))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.product(torch.sin(x), self.W, self.b))


@pytest.mark.parametrize(("product", "turned"), CASES, ids=NAMES)
def test_low_rank_updates_of_every_spelling_run_train_and_fold_as_updates_of_the_stack(
    product: Spelling, turned: bool
) -> None:
    model, x = Stack(product, turned).double(), torch.randn(EXPERTS * ROWS, IN).double()
    graph = ps.capture(model, {"x": x})
    found = [site for site in survey(graph.base_capture) if site.kind == "experts"]
    assert {site.parameter for site in found} == {"W"}
    assert {(s.facts["experts"], s.facts["in"], s.facts["out"]) for s in found} == {(3, 4, 6)}
    operated = ps.apply(graph, "lora_experts", rank=2, alpha=3).double()
    A, B = (operated.learnt()[f"lora_experts.W.{name}"] for name in "AB")
    for factor in (A, B):
        nn.init.normal_(factor)
    update = 1.5 * (B @ A)
    merged = model.W + (update.mT if turned else update)
    wanted = torch.func.functional_call(model, {"W": merged}, (x,))
    ours = operated(x=x)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)
    weights = torch.randn_like(ours)
    expected = torch.autograd.grad((wanted * weights).sum(), (A, B))
    (ours * weights).sum().backward()
    for factor, gradient in zip((A, B), expected, strict=True):
        torch.testing.assert_close(factor.grad, gradient, rtol=0, atol=1e-12)
    torch.testing.assert_close(ps.fold(operated).W, merged, rtol=0, atol=1e-12)


BIASED = """
name: biased
rules:
  - match: experts
    params: {c: {shape: [experts, out], init: normal(1)}, s: {shape: [out], init: normal(1)}}
    rewrite: y * s
    fold: {W: "W * s[:, None]", b: "b * s"}
"""


@pytest.mark.parametrize("name", [name for name in NAMES if "bias" in name or "baddbmm" in name])
def test_a_bias_of_each_expert_is_the_sites_own_and_folds_with_the_stack(name: str) -> None:
    product, turned = CASES[NAMES.index(name)]
    model, x = Stack(product, turned).double(), torch.randn(EXPERTS * ROWS, IN).double()
    operated = ps.apply(ps.capture(model, {"x": x}), ps.parse_rules(BIASED)).double()
    with torch.no_grad():
        folded = ps.fold(operated)
        torch.testing.assert_close(folded(x), operated(x=x), rtol=0, atol=1e-12)
        assert not torch.equal(folded.b, model.b)


class Other(nn.Module):
    """Stacks that are not picked from by their first axis, or not by one number."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.Parameter(torch.randn(3, 5, 4))
        self.heads = nn.Parameter(torch.randn(4, 2, 3))

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.tables[torch.zeros_like(ids), ids]
        return rows * x, torch.einsum("ni,ihd->nhd", x, self.heads)


def test_tables_and_heads_are_no_experts() -> None:
    inputs = {"x": torch.randn(6, 4), "ids": torch.tensor([0, 1, 2, 3, 4, 0])}
    graph = ps.capture(Other(), inputs)
    assert not [site for site in survey(graph.base_capture) if site.kind == "experts"]


def test_all_takes_linears_and_experts_and_leaves_routers_and_the_head() -> None:
    report = ps.apply(captured("mixtral"), "lora_all", rank=2).report.to_dict()
    assert report["kinds"]["experts"] == {"matched": 4, "of": 4}
    left = {role: found for role, found in report["coverage"].items() if not found["matched"]}
    assert left.keys() == {"moe.router", "lm_head", "embed.tokens"}
    assert ps.apply(captured("llama"), "lora_all").report.to_dict()["kinds"].keys() >= {"linear"}
