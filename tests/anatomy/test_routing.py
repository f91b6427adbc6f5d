"""A router is a linear whose output chooses experts; other choices are none of experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import peftsurgery as ps
from peftsurgery.anatomy import survey
from tests.models.captured import captured
from tests.models.zoo import ZOO, text


class Dense(nn.Module):
    """Every expert computes; the weights of those that were not chosen are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.choice = nn.Linear(8, 3)
        self.many = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        best, places = torch.topk(self.choice(x), 2)
        weights = torch.zeros_like(self.choice(x)).scatter(-1, places, best.softmax(-1))
        made = (expert(x) * weights[..., i : i + 1] for i, expert in enumerate(self.many))
        return x + sum(made)


class Sorted(nn.Module):
    """The best expert of a sort, by products with a stack of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.choice = nn.Linear(8, 3)
        self.stack = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        order = torch.sort(self.choice(x).sigmoid(), descending=True)
        first = F.one_hot(order.indices[..., 0], 3).to(x.dtype)
        tokens = (x[..., None] * first[..., None, :]).permute(3, 0, 1, 2).flatten(1, 2)
        return x + torch.bmm(tokens, self.stack).sum(0).view_as(x)


class Picked(nn.Module):
    """One of two linears for each token, picked by the larger of two scores."""

    def __init__(self) -> None:
        super().__init__()
        self.choice, self.one, self.other = nn.Linear(8, 2), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        best = self.choice(x).argmax(-1, keepdim=True)
        return x + torch.where(best == 0, self.one(x), self.other(x))


class Sparse(nn.Module):
    """Tokens chosen by a linear's score of each, and keys by the best of a query's scores."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.last = nn.Linear(8, 1), nn.Linear(8, 8)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        best = self.score(x).squeeze(-1).topk(3, -1).indices
        x = torch.gather(x, 1, best[..., None].expand(-1, -1, 8))
        scores = self.q(x) @ self.k(x).mT
        least = scores.topk(2, -1).values[..., -1:]
        y: Tensor = self.last(scores.masked_fill(scores < least, -1e9).softmax(-1) @ self.v(x))
        return y


class Quantised(nn.Module):
    """A choice of vectors of a codebook, and another of a class: no experts."""

    def __init__(self) -> None:
        super().__init__()
        self.choice, self.last = nn.Linear(8, 5), nn.Linear(8, 4)
        self.book = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        chosen = F.one_hot(self.choice(x).argmax(-1), 5).to(x.dtype)
        y = self.last((chosen[..., None] * self.book).sum(-2))
        return y, y.argmax(-1)


class Layers(nn.Module):
    """What comes behind, in a list whose elements are called."""

    def __init__(self) -> None:
        super().__init__()
        self.choice = nn.Linear(8, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2))

    def behind(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class BestTokens(Layers):
    """Tokens chosen by the best of their class scores, as detectors choose queries."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.choice(x)
        best = scores.max(-1).values.topk(3, dim=1).indices
        taken = torch.gather(x, 1, best[..., None].expand(-1, -1, 8))
        return self.behind(taken), torch.gather(scores, 1, best[..., None].expand(-1, -1, 4))


class ClassTokens(Layers):
    """For each class, the tokens that have most of it; they are weighed by how much."""

    def forward(self, x: Tensor) -> Tensor:
        best = self.choice(x).topk(2, dim=1)
        taken = x[torch.arange(len(x))[:, None, None], best.indices]
        return self.behind((taken * best.values[..., None]).sum(2))


class Codes(Layers):
    """The vector of a codebook that a linear says, and blocks behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.book = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.book[self.choice(x).argmax(-1)])


class Gathered(Layers):
    """The outputs of all experts, of which the best is taken, in a list of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.many = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        outputs = torch.stack([expert(x) for expert in self.many], -2)
        best = self.choice(x).argmax(-1)[..., None, None].expand(-1, -1, 1, 8)
        return self.behind(torch.gather(outputs, -2, best).squeeze(-2))


@pytest.mark.parametrize(
    ("kind", "routers"),
    [
        (Dense, ["choice"]),
        (Sorted, ["choice"]),
        (Picked, ["choice"]),
        (Sparse, []),
        (Quantised, []),
        (BestTokens, []),
        (ClassTokens, []),
        (Codes, []),
        (Gathered, ["choice"]),
    ],
)
def test_routers_are_the_linears_whose_output_chooses_experts(
    kind: type[nn.Module], routers: list[str]
) -> None:
    graph = ps.capture(kind(), {"x": torch.randn(2, 5, 8)})
    found = {site.module for site in survey(graph.base_capture) if site.role == "moe.router"}
    assert found == set(routers)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_lora_of_all_linears_leaves_routers_out_says_so_and_goes_to_peft(
    name: str, tmp_path: Path
) -> None:
    operated = ps.apply(captured(name), "lora_all_linear", rank=2)
    for parameter in operated.learnt().values():
        nn.init.normal_(parameter, std=0.1)
    report = operated.report.to_dict()
    assert report["coverage"]["moe.router"] == {"matched": 0, "of": 2}
    assert report["kinds"]["experts"] == {"matched": 0, "of": 4}
    assert "moe.router 0 of 2" in str(operated.report)
    assert "experts 0 of 4" in str(operated.report)
    ps.to_peft(operated, tmp_path)
    again = PeftModel.from_pretrained(ZOO[name].build(), tmp_path).eval()
    inputs = text(2, 5)
    with torch.no_grad():
        ours, theirs = operated.eval()(**inputs).logits, again(**inputs).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_an_adapter_of_a_router_is_read_and_changes_its_weight(tmp_path: Path) -> None:
    model, tensors = ZOO["mixtral"].build(), {}
    for layer in (0, 1):
        gate = f"model.layers.{layer}.mlp.gate"
        A, B = torch.randn(2, 32), torch.randn(4, 2)
        tensors[f"base_model.model.{gate}.lora_A.weight"] = A
        tensors[f"base_model.model.{gate}.lora_B.weight"] = B
        with torch.no_grad():
            model.get_parameter(f"{gate}.weight").add_(B @ A)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["gate"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    ours = ps.from_peft(captured("mixtral"), tmp_path).eval()
    assert {match["role"] for match in ours.report.matches} == {"moe.router"}
    with torch.no_grad():
        wanted = model(**text(3, 6)).logits
        torch.testing.assert_close(ours(**text(3, 6)).logits, wanted, rtol=0, atol=1e-5)
