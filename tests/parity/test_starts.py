"""PiSSA and OLoRA against peft in the same process, which changes the weights of its base.

Here the base stays as it is, so only what the two compute, learn and fold to can be compared.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import peftsurgery as ps
from peftsurgery.language.where import Where
from peftsurgery.surgery.model.operated import OperatedModel
from tests.parity.models import SMALL, base, batch, captured
from tests.parity.training import both_train, logits

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
# peft's olora takes a Conv1D's weight the wrong way round, and fails
CASES = [(m, n) for m in ("pissa", "olora") for n in ("llama", "gpt2", "bert", "t5", "qwen3")]
CASES.remove(("olora", "gpt2"))
LETTERS = {f"lora_{letter}.default.weight": letter for letter in "AB"}


@dataclass(frozen=True)
class Pair:
    """The same start on the same model, in peft and here."""

    name: str
    theirs: Any
    ours: OperatedModel

    def parameters(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Every tensor that peft trains, and ours."""
        found = []
        for full, theirs in self.theirs.named_parameters():
            for ending, letter in LETTERS.items():
                if full.endswith(ending):
                    module = full.removeprefix("base_model.model.").removesuffix(f".{ending}")
                    name = f"{module}.{self.ours.operations[0].name}.{letter}"
                    found.append((theirs, self.ours.get_parameter(name)))
        return found


def applied(name: str, method: str, **settings: Any) -> OperatedModel:
    rules = ps.load_rules(method)
    modules = captured(name).source.module.named_modules()
    ends = tuple(f".{target}" for target in SMALL[name].targets)
    where = Where(paths=tuple(path for path, _ in modules if path.endswith(ends)))
    rule = rules.rules[0].model_copy(update={"where": where, "expect": rules.rules[0].expect})
    rule = rule.model_copy(update={"expect": type(rule.expect)(at_least=1)})
    return ps.apply(captured(name), rules.model_copy(update={"rules": (rule,)}), **settings)


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case) for case in CASES])
def pair(request: pytest.FixtureRequest) -> Pair:
    method, name = request.param
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=list(SMALL[name].targets), init_lora_weights=method
    )
    theirs = get_peft_model(base(name), config).eval()
    return Pair(name, theirs, applied(name, method, rank=4, alpha=6).eval())


def test_the_start_is_pefts_and_the_model_is_what_it_was(pair: Pair) -> None:
    for theirs, ours in pair.parameters():
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        assert ours.abs().max() > 0.01
    assert torch.equal(logits(ps.eject(pair.ours)), logits(captured(pair.name)))
    assert torch.equal(logits(pair.ours), logits(captured(pair.name))), "peft's differs by rounding"


def test_outputs_gradients_losses_and_the_fold_are_pefts(pair: Pair, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    for theirs, ours in pair.parameters():
        theirs.data.add_(0.1 * torch.randn(theirs.shape, generator=generator))
        ours.data.copy_(theirs.data)
    torch.testing.assert_close(logits(pair.ours), logits(pair.theirs), rtol=0, atol=1e-6)
    assert (logits(pair.ours) - logits(captured(pair.name))).abs().max() > 0.01
    for model in (pair.theirs, pair.ours):
        model.zero_grad()
        model(**batch()).loss.backward()
    for theirs, ours in pair.parameters():
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-5)
    assert len(pair.parameters()) == sum(p.requires_grad for p in pair.ours.parameters())
    losses = both_train(pair.theirs, pair.ours)
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)

    folded, merged = ps.fold(pair.ours), deepcopy(pair.theirs).merge_and_unload()
    torch.testing.assert_close(logits(folded), logits(merged), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(folded), logits(pair.ours), rtol=0, atol=2e-6)
    pair.ours.save(tmp_path)
    again = ps.load(tmp_path, captured(pair.name)).eval()
    assert torch.equal(logits(again), logits(pair.ours))


@pytest.mark.parametrize(
    ("method", "name"), [("pissa", "llama"), ("pissa", "gpt2"), ("olora", "t5")]
)
def test_for_peft_it_is_lora_of_twice_the_rank(method: str, name: str, tmp_path: Path) -> None:
    ours = ps.apply(captured(name), method, rank=3, alpha=4)
    for parameter in ours.learnt().values():
        if parameter.requires_grad:
            parameter.data.mul_(1.3)
    ps.to_peft(ours.eval(), tmp_path)
    theirs = PeftModel.from_pretrained(base(name), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-6)
    assert (logits(ours) - logits(captured(name))).abs().max() > 0.01
    flat = ps.flatten(ours)
    assert flat.operations[0].file.name == "lora_qv"
    assert flat.operations[0].settings["rank"] == 6
    torch.testing.assert_close(logits(flat), logits(ours), rtol=0, atol=1e-6)


def test_a_rank_that_the_weight_does_not_have_is_refused() -> None:
    with pytest.raises(ps.SurgeryError, match="PSG123"):
        ps.apply(captured("llama"), "pissa", rank=64)


def test_parts_of_a_fused_weight_start_by_themselves() -> None:
    model = ps.apply(captured("gpt2"), "olora", rank=4).eval()
    assert len(model.learnt()) == 2 * 2 * 4
    assert torch.equal(logits(model), logits(captured("gpt2")))


def test_a_model_in_half_precision_starts_as_it_was() -> None:
    half = deepcopy(captured("llama")).to(torch.bfloat16)
    model = ps.apply(half, "pissa", rank=4).eval()
    assert {p.dtype for p in model.learnt().values()} == {torch.float32}
    assert torch.equal(logits(model), logits(half))
