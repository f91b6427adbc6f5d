"""Generation with a captured model: the tokens and the logits of the original, and its cache."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, Gemma3Config, Gemma3ForConditionalGeneration

import peftsurgery as ps
from tests.models.remembering import LEFT_PADDED, PAST, WAYS, original, prompts, remembering, tokens
from tests.models.zoo import ZOO, hf, ids


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_it_gives_the_originals_tokens(name: str) -> None:
    for settings in WAYS.values():
        expected = tokens(original(name), **settings)
        assert torch.equal(tokens(remembering(name), **settings), expected), settings


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_prefill_and_every_step_are_exact(name: str) -> None:
    """Beyond a sliding window (of 4) too, and where several tokens follow a past."""
    fed, mask = ids(3, 7), torch.tensor(LEFT_PADDED)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    theirs, mine = (DynamicCache(config=original(name).config) for _ in range(2))
    for new in (1, 1, 3, 1):
        call = {"input_ids": fed, "attention_mask": mask, "position_ids": positions}
        flags = {"use_cache": True, "logits_to_keep": 1, "return_dict": True}
        with torch.no_grad():
            expected = original(name)(**call, **flags, **{PAST: theirs})
            outputs = remembering(name)(**call, **flags, **{PAST: mine})
        assert torch.equal(outputs.logits, expected.logits)
        assert outputs[PAST] is mine
        assert list(outputs) == list(expected)
        for layer, other in zip(mine.layers, theirs.layers, strict=True):
            assert type(layer) is type(other)
            assert layer.get_seq_length() == other.get_seq_length()
            assert torch.equal(layer.keys, other.keys)
        fed, mask = ids(3, new), torch.cat([mask, torch.ones(3, new, dtype=torch.long)], dim=1)
        positions = (mask.cumsum(-1) - 1)[:, -new:]


@pytest.mark.parametrize("name", ["llama"])
def test_calls_without_a_cache_return_a_new_one(name: str) -> None:
    with torch.no_grad():
        expected, outputs = original(name)(ids(2, 5)), remembering(name)(ids(2, 5))
        assert torch.equal(outputs.logits, expected.logits)
        again = remembering(name)(
            ids(2, 1), attention_mask=torch.ones(2, 6), **{PAST: outputs[PAST]}
        )
        expected = original(name)(ids(2, 1), **{PAST: expected[PAST]})
    assert torch.equal(again.logits, expected.logits)
    assert again[PAST] is outputs[PAST]
    assert PAST not in remembering(name)(ids(2, 5), use_cache=False)


@pytest.mark.parametrize("name", ["llama"])
def test_training_keeps_nothing_for_a_next_call(name: str) -> None:
    model = copy.deepcopy(remembering(name)).train()
    outputs = model(ids(2, 5), labels=ids(2, 5))
    outputs.loss.backward()
    assert list(outputs) == ["loss", "logits"]
    model.gradient_checkpointing()  # what is recomputed would be remembered twice
    outputs = model(ids(2, 5), labels=ids(2, 5), use_cache=True)
    outputs.loss.backward()
    assert list(outputs) == ["loss", "logits"]


@pytest.mark.parametrize("name", ["llama"])
def test_a_cast_model_generates_what_the_cast_original_does(name: str) -> None:
    cast = copy.deepcopy(original(name)).to(torch.bfloat16)
    model = copy.deepcopy(remembering(name)).to(torch.bfloat16)
    assert torch.equal(tokens(model), tokens(cast))


@pytest.mark.parametrize("name", ["llama"])
def test_it_assists_the_original_and_says_that_it_can_generate(name: str) -> None:
    model, settings = remembering(name), {"max_new_tokens": 6, "do_sample": False}
    assert model.can_generate()
    expected = original(name).generate(ids(1, 6), **settings)
    assisted = original(name).generate(ids(1, 6), assistant_model=model, use_cache=True, **settings)
    assert torch.equal(assisted, expected)


@pytest.mark.parametrize("name", ["gpt2"])
def test_a_directory_brings_its_settings(name: str, tmp_path: Path) -> None:
    saved = copy.deepcopy(original(name))
    saved.generation_config.max_new_tokens = 5
    saved.save_pretrained(tmp_path)
    model = ps.capture(str(tmp_path), cache=True)
    with torch.inference_mode():
        made = model.generate(**prompts())
    assert made.shape == (3, 12)
    assert torch.equal(made, saved.generate(**prompts()))


@pytest.mark.parametrize("name", ["llama"])
def test_rules_are_applied_to_a_capture_without_a_cache(name: str) -> None:
    assert PAST not in remembering(name).base_capture.names


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2"])
def test_a_cache_of_fixed_length_works_too(name: str) -> None:
    expected = tokens(original(name), cache_implementation="static")
    assert torch.equal(tokens(remembering(name), cache_implementation="static"), expected)


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_other_models_do_not_generate(name: str) -> None:
    with pytest.raises(ps.SurgeryError) as caught:
        ps.capture(ZOO[name].build(), cache=True)
    assert caught.value.code == "PSG212"


STATES = {
    "mamba": ZOO["mamba"].build,
    "jamba": hf(  # whose second layer has keys and values
        "JambaForCausalLM",
        "JambaConfig",
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=1,
        num_experts_per_tok=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        pad_token_id=0,
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_states_are_refused_whoever_gives_them_and_tokens_are_the_same_without(name: str) -> None:
    torch.manual_seed(0)
    model = STATES[name]().eval()
    captured, greedy = ps.capture(model), {"max_new_tokens": 3, "do_sample": False}
    for prompt in (ids(1, 6), ids(2, 5)):
        with pytest.raises(ps.SurgeryError, match=r"keys and values\n.*use_cache=False") as caught:
            captured.generate(prompt, **greedy, use_cache=True)
        assert caught.value.code == "PSG210"
        expected = model.generate(prompt, **greedy, use_cache=True)
        assert torch.equal(captured.generate(prompt, **greedy, use_cache=False), expected)


def test_states_that_are_no_keys_and_values_are_refused() -> None:
    with pytest.raises(ps.SurgeryError, match="keys and values") as caught:
        ps.capture(ZOO["mamba"].build(), cache=True)
    assert caught.value.code == "PSG210"


def test_a_model_within_a_model_remembers_nothing_unasked() -> None:
    text = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}
    image = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    image |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config={**text, **heads}, vision_config=image, use_cache=False)
    model = Gemma3ForConditionalGeneration(config).eval()
    inner = model.config.text_config
    assert inner.use_cache
    graph, ids = ps.capture(model), torch.randint(5, 90, (3, 11))
    with torch.no_grad():
        expected, given = model(input_ids=ids), graph(input_ids=ids)
    assert "past_key_values" in expected
    assert "past_key_values" not in given
    assert torch.equal(expected.logits, given.logits)
    assert inner.use_cache
