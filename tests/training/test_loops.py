"""Plain loops: groups for an optimiser as peft makes them, and models that compute no loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn

import peftsurgery as ps
from tests.parity.models import SMALL, base, batch, captured
from tests.training.test_heads import captured as classifier


def losses(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    found = []
    for step in range(20):
        loss = model(**batch(3, 6 + step % 3)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_lora_plus_trains_as_pefts(tmp_path: Any) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=list(SMALL["llama"].targets))
    theirs: Any = get_peft_model(base("llama"), config).train()
    theirs.save_pretrained(tmp_path)
    ours = ps.from_peft(captured("llama"), tmp_path).train()
    one = create_loraplus_optimizer(
        theirs,
        torch.optim.AdamW,
        loraplus_lr_ratio=8.0,
        loraplus_weight_decay=0.01,
        lr=1e-3,
    )
    other = torch.optim.AdamW(ps.lora_plus(ours, 1e-3, ratio=8.0), weight_decay=0.01)
    expected = losses(theirs, one)
    assert losses(ours, other) == pytest.approx(expected, abs=1e-5)
    assert expected[-1] < expected[1]


def test_lora_plus_has_every_trained_parameter_once() -> None:
    model = ps.apply(classifier(), "lora_qv", train="classifier")
    slow, fast = ps.lora_plus(model, 1e-3, ratio=4.0)
    assert (slow["lr"], fast["lr"]) == (1e-3, 4e-3)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].rpartition(".")[2] for p in fast["params"]} == {"B"}
    everything = [id(p) for group in (slow, fast) for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    with pytest.raises(ps.SurgeryError, match=r"PSG324.*no rule has a parameter 'C'"):
        ps.lora_plus(model, 1e-3, faster=["C"])


NAMED = """
name: named
with: {rank: 2}
rules:
  - match: linear
    where: {role: attn.q}
    params:
      Down: {shape: [rank, in], init: normal(1)}
      Up: {shape: [out, rank], init: zeros}
    rewrite: y + linear(linear(x, Down), Up)
"""


@pytest.mark.parametrize(("rule", "fast"), [("dora", "B"), ("adalora", "B"), (NAMED, "Up")])
def test_lora_plus_finds_the_factor_that_leads_to_the_outputs(rule: str, fast: str) -> None:
    model = ps.apply(captured("llama"), ps.parse_rules(rule) if "\n" in rule else rule)
    _, group = ps.lora_plus(model, 1e-3)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].rpartition(".")[2] for p in group["params"]} == {fast}


def test_lora_plus_says_that_there_is_no_such_factor() -> None:
    with pytest.raises(ps.SurgeryError, match=r"PSG324.*no rule has a parameter from its ranks"):
        ps.lora_plus(ps.apply(captured("llama"), "ia3"), 1e-3)


class Features(nn.Module):
    """A model that gives features, and no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(torch.tanh(self.first(x)))
        return result


def test_a_model_without_a_loss_takes_the_penalty_from_the_model() -> None:
    torch.manual_seed(0)
    features, x, wanted = Features(), torch.randn(8, 6), torch.randn(8, 4)
    settings = {"rank": 4, "target": 1, "total_steps": 40, "final_steps": 10}
    model = ps.apply(ps.capture(features, (x,)), "adalora", **settings).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    allocator = ps.RankAllocator(model)
    errors, penalties = [], []
    for step in range(40):
        error, penalty = nn.functional.mse_loss(model(x), wanted), model.penalty()
        (error + penalty).backward()
        optimizer.step()
        allocator.step(step)
        optimizer.zero_grad()
        errors.append(error.item())
        penalties.append(penalty.item())
    assert errors[-1] < errors[0]
    assert penalties[-1] < penalties[0]
    ranks = {n: int(p.any(1).sum()) for n, p in model.learnt().items() if n.endswith(".E")}
    assert sum(ranks.values()) == 2
