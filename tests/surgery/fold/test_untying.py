"""Broken ties: from_pretrained gives back exactly what was folded, or the fold is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.surgery.model.operated import OperatedModel
from tests.models.captured import captured
from tests.models.zoo import VOCABULARY, ZOO, hf, seq2seq, text
from tests.surgery.reference import randomise

HEADS = {"bert_mlm": "decoder", "bart": "lm_head", "t5": "lm_head", "gpt2": "lm_head"}
UMT5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "use_cache": False,
}


def operated_on(name: str, what: str) -> OperatedModel:
    """The model with an adapted embedding, or with its own head trained, which unties them."""
    rules = [] if what == "head" else what
    train = [HEADS[name]] if what == "head" else []
    return randomise(ps.apply(captured(name), rules, train=train), scale=0.1).eval()


def first(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**inputs)[0]
    return result


def reloaded(folded: Any, folder: Path) -> Any:
    """What transformers reads of what it wrote; it must find every weight."""
    folded.save_pretrained(folder)
    again, info = type(folded).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return again.eval()


def ties(module: nn.Module) -> set[frozenset[str]]:
    """The names that are one tensor."""
    names: dict[int, list[str]] = {}
    for name, tensor in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


@pytest.mark.parametrize("what", ["lora_embedding", "head"])
@pytest.mark.parametrize("name", HEADS)
def test_a_fold_that_breaks_a_tie_reloads_exactly(name: str, what: str, tmp_path: Path) -> None:
    operated, inputs = operated_on(name, what), ZOO[name].inputs(3, 6)
    folded = ps.fold(operated)
    again = reloaded(folded, tmp_path)
    assert ties(captured(name).source.module)
    torch.testing.assert_close(first(folded, inputs), first(operated, inputs), atol=1e-5, rtol=1e-5)
    assert torch.equal(first(again, inputs), first(folded, inputs))
    for key, value in folded.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


@pytest.mark.parametrize("what", ["lora_embedding", "head"])
def test_a_fold_leaves_the_base_tied(what: str) -> None:
    base: Any = captured("bart").source.module
    before = ties(base)
    ps.fold(operated_on("bart", what))
    assert ties(base) == before
    assert base.config.tie_word_embeddings


@pytest.mark.parametrize("name", HEADS)
def test_a_fold_that_breaks_no_tie_leaves_them(name: str, tmp_path: Path) -> None:
    operated = randomise(ps.apply(captured(name), "lora_attention"))
    folded: Any = ps.fold(operated)
    base: Any = captured(name).source.module
    assert ties(folded) == ties(base)
    assert folded.config.tie_word_embeddings
    assert ties(reloaded(folded, tmp_path)) == ties(base)


def test_a_flag_that_the_config_sets_again_stays(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = hf("UMT5ForConditionalGeneration", "UMT5Config", **UMT5)().eval()  # it scales by it
    inputs = seq2seq(3, 6)
    graph = ps.capture(model, inputs=seq2seq(2, 7))
    operated = randomise(ps.apply(graph, "lora_embedding"), scale=0.1).eval()
    folded = ps.fold(operated)
    torch.testing.assert_close(first(folded, inputs), first(operated, inputs), atol=1e-5, rtol=1e-5)
    assert torch.equal(first(reloaded(folded, tmp_path), inputs), first(folded, inputs))


class Scaled(transformers.GPT2LMHeadModel):
    """It scales the outputs of a head that is tied."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        result = super().forward(input_ids=input_ids, attention_mask=attention_mask)
        return (result.logits * (0.5 if self.config.tie_word_embeddings else 1.0),)


def test_a_flag_that_the_model_computes_with_stays(tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph = ps.capture(Scaled(captured("gpt2").config).eval(), inputs=text(2, 7))
    operated = randomise(ps.apply(graph, "lora_embedding"), scale=0.1).eval()
    folded, inputs = ps.fold(operated), text(3, 6)
    torch.testing.assert_close(first(folded, inputs), first(operated, inputs), atol=1e-5, rtol=1e-5)
    assert torch.equal(first(reloaded(folded, tmp_path), inputs), first(folded, inputs))


class Insisting(transformers.GPT2LMHeadModel):
    """It ties its head whatever the config and the files say."""

    def tie_weights(self, *arguments: Any, **options: Any) -> None:
        super().tie_weights(*arguments, **options)
        self.lm_head.weight = self.transformer.wte.weight


def test_a_tie_that_the_architecture_insists_on_is_refused() -> None:
    model = Insisting(captured("gpt2").config).eval()
    graph = ps.capture(model, inputs=text(2, 7))
    with pytest.raises(ps.SurgeryError, match=r"PSG404.*ties them again"):
        ps.fold(randomise(ps.apply(graph, "lora_embedding")))
    ps.fold(randomise(ps.apply(graph, "lora_qv")))


class Configured(transformers.GPT2LMHeadModel):
    """It cannot be made from a config alone."""

    def __init__(self, config: Any, extra: int) -> None:
        super().__init__(config)


def test_a_model_that_transformers_cannot_load_is_not_untied() -> None:
    graph = ps.capture(Configured(captured("gpt2").config, 1).eval(), inputs=text(2, 7))
    with pytest.raises(ps.SurgeryError, match=r"PSG404.*cannot be tried.*extra"):
        ps.fold(randomise(ps.apply(graph, "lora_embedding")))
