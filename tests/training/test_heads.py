"""A new head trained beside an adapter: from Python, from a rule file, and as peft has it."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import peftsurgery as ps
from tests.parity.models import SIZES, VOCABULARY, randomise

HEAD = {"classifier.weight", "classifier.bias"}


@cache
def classifier() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, num_labels=3, hidden_dropout_prob=0.0)
    config.attention_probs_dropout_prob = 0.0
    return transformers.BertForSequenceClassification(config).eval()


def batch(rows: int = 4, length: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows + length)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    return {"input_ids": ids, "labels": torch.arange(rows) % 3}


@cache
def captured() -> ps.GraphModel:
    return ps.capture(classifier(), inputs=batch(3, 5))


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def train(model: Any, steps: int = 10) -> list[float]:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    losses = []
    for step in range(steps):
        loss = model(**batch(4, 6 + step % 3)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_head_is_trained_and_saved_with_the_adapter(tmp_path: Path) -> None:
    model = ps.apply(captured(), "lora_qv", train=["classifier"])
    assert {name for name in trained(model) if "lora_qv" not in name} == HEAD
    before = {name: value.clone() for name, value in classifier().state_dict().items()}
    losses = train(model.train())
    assert losses[-1] < losses[0]
    for name, value in classifier().state_dict().items():
        assert torch.equal(value, before[name]), "the user's own model stays as it is"

    model.save(tmp_path)
    saved = load_file(tmp_path / "adapter.safetensors")
    assert saved.keys() == trained(model)
    again = ps.load(tmp_path, captured()).eval()
    with torch.no_grad():
        expected = model.eval()(**batch()).logits
        assert torch.equal(again(**batch()).logits, expected)
        torch.testing.assert_close(ps.fold(model)(**batch()).logits, expected, rtol=0, atol=2e-6)
    assert torch.equal(
        ps.eject(model).get_parameter("classifier.weight"), before["classifier.weight"]
    )


RULES = """
name: head
rules:
  - {match: parameter, where: {path: 'classifier\\..*'}, train: true}
"""


def test_a_rule_file_and_the_keyword_train_the_same() -> None:
    by_rule = ps.apply(captured(), ps.parse_rules(RULES))
    by_word = ps.apply(captured(), [], train="classifier")
    assert trained(by_rule) == trained(by_word) == HEAD
    assert train(by_rule.train()) == train(by_word.train())
    bias = ps.apply(captured(), [], name="shift", train=["classifier.bias"])
    assert trained(bias) == {"classifier.bias"}


def test_a_part_that_is_not_there_is_refused() -> None:
    with pytest.raises(ps.SurgeryError, match="PSG301"):
        ps.apply(captured(), "lora_qv", train=["classifier", "clasifier"])


@pytest.mark.slow
def test_modules_to_save_are_pefts(tmp_path: Path) -> None:
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["query", "value"], modules_to_save=["classifier"]
    )
    theirs: Any = get_peft_model(deepcopy(classifier()), config).eval()
    randomise(theirs, lambda name: "lora_" in name or "modules_to_save" in name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ps.from_peft(captured(), tmp_path / "theirs")
    classifier().save_pretrained(tmp_path / "base")
    on_directory = ps.from_peft(ps.capture(str(tmp_path / "base")), tmp_path / "theirs").eval()
    with torch.no_grad():
        expected = theirs(**batch()).logits
        torch.testing.assert_close(on_directory(**batch()).logits, expected, rtol=0, atol=1e-6)
    count = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == count
    assert train(ours.train(), 20) == pytest.approx(train(theirs.train(), 20), abs=1e-5)

    mine = ps.apply(captured(), "lora_qv", train="classifier", rank=4, alpha=6)
    train(mine.train())
    ps.to_peft(mine, tmp_path / "ours")
    again = PeftModel.from_pretrained(deepcopy(classifier()), tmp_path / "ours").eval()
    with torch.no_grad():
        expected = mine.eval()(**batch()).logits
        torch.testing.assert_close(again(**batch()).logits, expected, rtol=0, atol=1e-6)
