"""BitFit beside LoRA, as peft's ``bias``, on architectures with biases; peft is the oracle.

Llama and Qwen3 have biases where their config asks for them; T5 has none.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

import peftsurgery as ps
from peftsurgery.errors import SurgeryError
from peftsurgery.surgery.model.operated import OperatedModel
from tests.parity.models import SMALL, base, batch, captured, randomise
from tests.parity.training import both_train, logits

BIASED = {"attention_bias": True, "mlp_bias": True}
# one parameter: the first name is that of its first module, the second the one its layer reads
TIED = {"cls.predictions.bias": "cls.predictions.decoder.bias"}
NAMES = ("bert", "gpt2", "llama", "qwen3")
WORDS = ("all", "lora_only")
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")


def read_as(name: str) -> str:
    return TIED.get(name, name)


def biased(name: str) -> nn.Module:
    small = SMALL[name]
    if name in ("llama", "qwen3"):
        return replace(small, settings={**small.settings, **BIASED}).build()
    return base(name)


@cache
def graph(name: str) -> ps.GraphModel:
    return ps.capture(biased(name), inputs=batch(2, 5))


def adapted(name: str, word: str) -> OperatedModel:
    """LoRA and the biases that ``word`` means, under one name, all random."""
    # a fused weight is one adapter to peft, and so it has to be here for training to be the same
    lora = "lora_all_linear" if name == "gpt2" else "lora_qv"
    only = lora if word == "lora_only" else None
    ours = ps.apply(graph(name), [lora, "bitfit"], name="default", rank=4, alpha=6, matched=only)
    trained = {n for n, p in ours.named_parameters() if p.requires_grad}
    randomise(ours, trained.__contains__, 0.1)
    return ours.eval()


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("name", NAMES)
def test_lora_with_biases_is_pefts(name: str, word: str, tmp_path: Path) -> None:
    ours = adapted(name, word)
    ps.to_peft(ours, tmp_path)
    theirs: Any = PeftModel.from_pretrained(biased(name), tmp_path, is_trainable=True).eval()
    assert theirs.peft_config["default"].bias == word
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-6)

    for model in (ours, theirs):
        model.zero_grad()
        model(**batch()).loss.backward()
    biases = [n for n, p in ours.named_parameters() if p.requires_grad and n.endswith("bias")]
    theirs_by_name = {
        read_as(n.removeprefix("base_model.model.").replace(".base_layer", "")): p
        for n, p in theirs.named_parameters()
        if p.requires_grad and n.endswith("bias")
    }
    assert biases
    assert set(biases) == set(theirs_by_name)
    for name in biases:
        expected = theirs_by_name[name].grad
        torch.testing.assert_close(ours.get_parameter(name).grad, expected, rtol=0, atol=1e-5)

    mine, other = both_train(ours, theirs)
    assert mine == pytest.approx(other, abs=1e-5)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(logits(ps.fold(ours)), logits(merged), rtol=0, atol=5e-6)


@pytest.mark.parametrize("word", WORDS)
def test_what_peft_says_of_biases_is_read_back(word: str, tmp_path: Path) -> None:
    ours = adapted("gpt2", word)
    ps.to_peft(ours, tmp_path)
    again = ps.from_peft(graph("gpt2"), tmp_path).eval()
    assert again.trained == ours.trained
    torch.testing.assert_close(logits(again), logits(ours), rtol=0, atol=1e-6)


def test_only_biases_are_trained_and_the_rest_stays(tmp_path: Path) -> None:
    ours = ps.apply(captured("bert"), "bitfit")
    trained = {n for n, p in ours.named_parameters() if p.requires_grad}
    named = {read_as(n) for n, _ in base("bert").named_parameters() if n.endswith("bias")}
    assert trained == named
    randomise(ours, trained.__contains__, 0.1)
    ours.save(tmp_path)
    assert torch.equal(logits(ps.load(tmp_path, captured("bert"))), logits(ours))
    assert ps.eject(ours) is captured("bert")
    folded: Any = ps.fold(ours)
    torch.testing.assert_close(logits(folded), logits(ours), rtol=0, atol=2e-6)
    assert folded.cls.predictions.bias is folded.cls.predictions.decoder.bias


def test_refusals(tmp_path: Path) -> None:
    for code, make in {
        "PSG301": lambda: ps.apply(captured("t5"), "bitfit"),
        "PSG145": lambda: ps.apply(captured("bert"), "bitfit", matched="lora_qv"),
        "PSG510": lambda: ps.to_peft(ps.apply(captured("bert"), "bitfit"), tmp_path),
    }.items():
        with pytest.raises(SurgeryError) as caught:
            make()
        assert caught.value.code == code
    both = ps.apply(captured("bert"), ["lora_qv", "bitfit"], matched="lora_qv")
    with pytest.raises(SurgeryError) as caught:
        ps.eject(both, "lora_qv")
    assert caught.value.code == "PSG145"
    assert set(ps.eject(both, "bitfit").trained) == set()
