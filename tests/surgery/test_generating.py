"""Operated models generate: what peft's models generate, or what they give without a cache."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import peftsurgery as ps
from tests.models.captured import captured
from tests.models.remembering import PAST, WAYS, original, remembering, tokens
from tests.models.zoo import ids

GREEDY_AND_BEAMS = [WAYS["greedy"], WAYS["beams"]]


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_what_does_not_generate_says_so_with_a_prompt_too(name: str) -> None:
    prompted = ps.apply(captured(name), "prompt_tuning", length=2)
    with pytest.raises(ps.SurgeryError, match="PSG212"):
        prompted.generate(ids(2, 5))


def by_peft(name: str, config: Any, folder: Path) -> tuple[Any, ps.OperatedModel]:
    """peft's model with random adapters, and ours with the same ones from its files."""
    torch.manual_seed(1)
    theirs = peft.get_peft_model(copy.deepcopy(original(name)), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) / 2)
    theirs.save_pretrained(folder)
    return theirs, ps.from_peft(remembering(name), folder)


@pytest.mark.parametrize("name", ["llama"])
def test_lora_generates_as_in_peft_and_folded(name: str, tmp_path: Path) -> None:
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    theirs, ours = by_peft(name, settings, tmp_path)
    for way in WAYS.values():
        made = tokens(ours, **way)
        assert torch.equal(made, tokens(theirs, **way))
        assert torch.equal(made, tokens(ps.fold(ours), **way))
    assert not torch.equal(tokens(ours), tokens(original(name)))


@pytest.mark.parametrize("name", ["llama"])
def test_a_cache_makes_no_difference_to_prefixes(name: str) -> None:
    """Queries that share keys are packed in decoding, which a rewritten core must bear."""
    operated = ps.apply(remembering(name), "prefix_tuning", length=4, shift=True)
    for parameter in operated.learnt().values():
        torch.nn.init.normal_(parameter, std=0.5)
    for way in GREEDY_AND_BEAMS:
        assert torch.equal(tokens(operated, **way), tokens(operated, **way, use_cache=False))
    assert not torch.equal(tokens(operated), tokens(original(name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama"])
def test_prompts_generate_as_in_peft(name: str, tmp_path: Path) -> None:
    """The original goes on in the same way from the prompt's vectors and the text's.

    peft is asked without a cache: 0.21 looks for one by the name it had before transformers 5.24,
    and puts its prompt before every new token where it does not find it.
    """
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    theirs, ours = by_peft(name, settings, tmp_path)
    plain = original(name)
    prompt = theirs.get_prompt_embedding_to_save("default").expand(2, -1, -1)
    vectors = torch.cat([prompt, plain.get_input_embeddings()(ids(2, 6))], dim=1)
    whole = {"inputs_embeds": vectors, "attention_mask": torch.ones(vectors.shape[:2]).long()}
    for way in GREEDY_AND_BEAMS:
        given = {"input_ids": ids(2, 6), **way}
        made = ours.generate(**given, max_new_tokens=5)
        assert torch.equal(made[:, 6:], plain.generate(**whole, **way, max_new_tokens=5))
        assert torch.equal(made, theirs.generate(**given, max_new_tokens=5, use_cache=False))
        assert torch.equal(made, ours.generate(**given, max_length=11))
    assert not torch.equal(made, original(name).generate(**given, max_new_tokens=5))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama"])
def test_prompts_are_not_put_before_a_text_twice(name: str) -> None:
    prompted = ps.apply(remembering(name), "prompt_tuning", length=5)
    outputs = prompted(ids(2, 4))
    assert outputs[PAST].get_seq_length() == 9
    with pytest.raises(ps.SurgeryError) as caught:
        prompted(ids(2, 1), **{PAST: outputs[PAST]})
    assert caught.value.code == "PSG354"
