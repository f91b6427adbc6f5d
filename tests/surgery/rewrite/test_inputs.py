"""Rules about the model's inputs: virtual tokens anywhere in a text, ensembles, refusals.

The oracle is the original model, given embeddings that are put together by hand.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import peftsurgery as ps
from peftsurgery.errors import SurgeryError
from peftsurgery.surgery.model.operated import OperatedModel
from tests.models.captured import captured as models
from tests.models.zoo import ZOO
from tests.parity.models import DECODER, T5, base, batch, captured

PLACES = [0, 2, 2, -1, 100]


@cache
def built() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**DECODER, "num_hidden_layers": 1})).eval()


def plain() -> LlamaForCausalLM:
    """A copy of the model, to be wrapped and changed by peft."""
    return deepcopy(built())


@cache
def graph() -> ps.GraphModel:
    """The captured model; not to be changed."""
    return ps.capture(built(), inputs=batch(2, 5))


def by_hand(
    prompt: Tensor, places: list[int], given: dict[str, Tensor], filler: int
) -> tuple[Tensor, Tensor]:
    """Embeddings and another input of the text, the prompt's tokens put in one by one."""
    embeds = plain().get_input_embeddings()(given["input_ids"])
    other = next(value for name, value in given.items() if name != "input_ids")
    rows, length = other.shape
    at = [place + length if place < 0 else min(place, length) for place in places]
    parts: list[tuple[Tensor, Tensor]] = []
    for number in range(length + 1):
        for token, place in zip(prompt, at, strict=True):
            if place == number:
                new = other.new_full((rows, 1), filler)
                parts.append((token.expand(rows, 1, -1), new))
        if number < length:
            parts.append((embeds[:, number : number + 1], other[:, number : number + 1]))
    return torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts], 1)


@cache
def placed() -> OperatedModel:
    return ps.apply(graph(), "prompt_tuning", places=PLACES).eval()


@torch.no_grad()
def test_virtual_tokens_are_at_their_places_and_labels_move_with_the_text() -> None:
    given = batch(3, 7)
    prompt = placed().get_parameter("prompt_tuning.P")
    assert prompt.shape == (5, 32), "one for each place"
    embeds, labels = by_hand(prompt, PLACES, given, -100)
    expected = plain()(inputs_embeds=embeds, labels=labels)
    actual = placed()(**given)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=0, atol=1e-6)


@pytest.mark.slow
@torch.no_grad()
def test_a_mask_moves_with_the_text_and_positions_count_on() -> None:
    ids = batch(2, 6)["input_ids"]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    prompt = placed().get_parameter("prompt_tuning.P")
    embeds, longer = by_hand(prompt, PLACES, {"input_ids": ids, "mask": mask}, 1)
    actual = placed()(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    # the row that is not padded has the positions that the model itself would count
    alone = plain()(inputs_embeds=embeds[1:]).logits
    torch.testing.assert_close(actual[1:], alone, rtol=0, atol=1e-6)
    # in the other row too, a token that is put in has the position of the one behind it
    counted = torch.tensor([[0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8]])
    assert longer[:1].tolist() == [[1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]]
    expected = plain()(inputs_embeds=embeds[:1], attention_mask=longer[:1], position_ids=counted)
    torch.testing.assert_close(actual[:1], expected.logits, rtol=0, atol=1e-6)


def test_a_prompt_behind_the_embeddings_may_be_longer_than_the_text() -> None:
    original = base("bert")
    operated = ps.apply(captured("bert"), "prompt_after_embedding", length=12).eval()
    P = operated.learnt().popitem()[1].detach()
    ids = torch.randint(1, 20, (3, 5))

    def put_before(part: Any, args: Any, embeds: Tensor) -> Tensor:
        return torch.cat((P.expand(len(embeds), -1, -1), embeds), 1)

    original.get_submodule("bert.embeddings").register_forward_hook(put_before)
    with torch.no_grad():
        expected, made = original(input_ids=ids)[0], operated(input_ids=ids)[0]
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("vote", [False, True], ids=["mean", "vote"])
def test_an_ensemble_is_its_prompts_run_one_by_one(vote: bool) -> None:
    ours = ps.apply(graph(), "prompt_ensemble", prompts=3, length=4, vote=vote).eval()
    given = batch(2, 7)
    results = []
    for prompt in ours.get_parameter("prompt_ensemble.P"):
        embeds, labels = by_hand(prompt, [0] * 4, given, -100)
        results.append(plain()(inputs_embeds=embeds, labels=labels))
    logits = torch.stack([result.logits for result in results])
    choices = F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    expected = (choices if vote else logits).mean(0)
    actual = ours(**given)
    torch.testing.assert_close(actual.logits, expected, rtol=0, atol=1e-6)
    losses = torch.stack([result.loss for result in results])
    torch.testing.assert_close(actual.loss, losses.mean(), rtol=0, atol=1e-6)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "bart"])
def test_an_ensemble_repeats_the_answers_and_what_the_decoder_is_given(name: str) -> None:
    original, given = ZOO[name].build(), ZOO[name].inputs(3, 6)
    answers = torch.tensor([0, 1, 1])
    given["labels"] = given["decoder_input_ids"].flip(1) if name == "bart" else answers
    ours = ps.apply(models(name), "prompt_ensemble", prompts=2, length=4).eval()
    words = original.get_input_embeddings()(given["input_ids"])
    rest = {key: value for key, value in given.items() if key != "input_ids"}
    if "attention_mask" in rest:
        rest["attention_mask"] = F.pad(rest["attention_mask"], (4, 0), value=1)
    results = [
        original(inputs_embeds=torch.cat([prompt.expand(3, -1, -1), words], 1), **rest)
        for prompt in ours.get_parameter("prompt_ensemble.P")
    ]
    actual = ours(**given)
    logits = torch.stack([result.logits for result in results]).mean(0)
    torch.testing.assert_close(actual.logits, logits, rtol=0, atol=1e-6)
    loss = torch.stack([result.loss for result in results]).mean()
    torch.testing.assert_close(actual.loss, loss, rtol=0, atol=1e-6)
    same = given["input_ids"]
    if name == "bart":
        assert ours(input_ids=same, labels=same).loss.isfinite(), "one tensor for two inputs"


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_a_prompt_before_texts_of_other_sizes_than_were_captured(name: str) -> None:
    ours, original = ps.apply(models(name), "prompt_tuning", length=5), ZOO[name].build()
    for rows, length in ((3, 7), (4, 6)):
        ids = torch.arange(rows * length).view(rows, length)
        given = {"attention_mask": torch.ones_like(ids), "use_cache": False}
        prompt = ours.get_parameter("prompt_tuning.P").expand(rows, -1, -1)
        embeds = torch.cat([prompt, original.get_input_embeddings()(ids)], 1)
        longer = {**given, "attention_mask": torch.ones(embeds.shape[:2], dtype=torch.long)}
        expected = original(inputs_embeds=embeds, **longer).logits
        actual = ours.eval()(input_ids=ids, **given).logits
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_prompt_starts_as_the_embeddings_of_tokens_or_of_the_vocabulary() -> None:
    table = plain().get_input_embeddings().weight
    tokens = ps.apply(graph(), "prompt_tuning", length=5, init_tokens=[7, 3])
    assert torch.equal(tokens.get_parameter("prompt_tuning.P"), table[[7, 3, 7, 3, 7]])
    drawn = ps.apply(graph(), "prompt_tuning", length=5, sampled=True)
    for row in drawn.get_parameter("prompt_tuning.P"):
        assert (table == row).all(1).any()


@pytest.mark.slow
def test_a_prompt_starts_as_a_text_if_there_is_a_tokenizer(tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({"[UNK]": 0, "good": 5, "bad": 6}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    tokenizer.save_pretrained(tmp_path)
    plain().save_pretrained(tmp_path)
    stored = ps.capture(str(tmp_path))
    ours = ps.apply(stored, "prompt_tuning", length=3, init_text="bad good")
    # peft repeats a text that is too short in the same way
    config = {"num_virtual_tokens": 3, "prompt_tuning_init": "TEXT", "task_type": "CAUSAL_LM"}
    config |= {"prompt_tuning_init_text": "bad good", "tokenizer_name_or_path": str(tmp_path)}
    theirs = get_peft_model(plain(), PromptTuningConfig(**config))
    expected = theirs.prompt_encoder["default"].embedding.weight
    assert torch.equal(ours.get_parameter("prompt_tuning.P"), expected)
    assert ps.load_rules("prompt_tuning").with_["init_tokens"] == []
    code = refusal(lambda: ps.apply(graph(), "prompt_tuning", init_text="good")).code
    assert code == "PSG126"
    assert refusal(lambda: ps.apply(stored, "lora_qv", init_text="good")).code == "PSG120"


@torch.no_grad()
def test_what_is_saved_comes_back_and_ejected_is_the_original(tmp_path: Path) -> None:
    ours = ps.apply(graph(), "p_tuning", lstm=True, hidden=6, places=[0, 3]).eval()
    given = batch(3, 7)
    expected = ours(**given).logits
    ours.save(tmp_path)
    assert torch.equal(ps.load(tmp_path, base=graph())(**given).logits, expected)
    flat = ps.flatten(ours)
    assert list(flat.learnt()) == ["p_tuning.P"]
    torch.testing.assert_close(flat(**given).logits, expected, rtol=0, atol=1e-6)
    assert torch.equal(ps.eject(ours)(**given).logits, plain()(**given).logits)
    ours.deactivate("p_tuning")
    assert torch.equal(ours(**given).logits, plain()(**given).logits)


@torch.no_grad()
def test_what_else_is_done_to_the_embeddings_is_done_to_the_text_alone() -> None:
    embedding = ps.apply(graph(), "lora_embedding", rank=2)
    embedding.get_parameter("model.embed_tokens.lora_embedding.A").normal_()
    both = ps.apply(ps.apply(graph(), "prompt_tuning", length=4), "lora_embedding", rank=2).eval()
    for name, value in embedding.learnt().items():
        both.get_parameter(name).copy_(value)
    ids = batch(2, 5)["input_ids"]
    folded = ps.fold(embedding)
    embeds = folded.get_input_embeddings()(ids)
    prompt = both.get_parameter("prompt_tuning.P").expand(2, -1, -1)
    expected = plain()(inputs_embeds=torch.cat((prompt, embeds), 1)).logits
    torch.testing.assert_close(both(input_ids=ids).logits, expected, rtol=0, atol=1e-6)


def test_a_window_that_the_prompt_fills_is_captured_with_the_longer_text() -> None:
    """A sliding window is a branch by length: 6 tokens are within it, and 10 are not."""
    settings = {**DECODER, "num_hidden_layers": 1, "sliding_window": 8}
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**settings)).eval()
    ours = ps.apply(ps.capture(model, inputs=batch(2, 3)), "prompt_tuning", length=4).eval()
    given = batch(2, 6)
    prompt = ours.get_parameter("prompt_tuning.P").expand(2, -1, -1)
    embeds = torch.cat((prompt, model.get_input_embeddings()(given["input_ids"])), 1)
    expected = model(inputs_embeds=embeds).logits
    torch.testing.assert_close(ours(**given).logits, expected, rtol=0, atol=1e-6)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma2", "opt", "bart"])
def test_other_embeddings_sizes_and_decoders_are_left_alone(name: str) -> None:
    """Embeddings that are scaled, ids that are viewed by the mask's size, a decoder's own text."""
    model, inputs = ZOO[name].build(), ZOO[name].inputs
    ours = ps.apply(ps.capture(model, inputs=inputs(2, 7)), "prompt_tuning", length=3).eval()
    prompt = ours.get_parameter("prompt_tuning.P").mul_(0.05).expand(3, -1, -1)
    given = inputs(3, 6)
    longer = dict(given)
    embeds = model.get_input_embeddings()(longer.pop("input_ids"))
    longer["inputs_embeds"] = torch.cat((prompt, embeds), 1)
    longer["attention_mask"] = F.pad(longer["attention_mask"], (3, 0), value=1)
    expected = model(**longer).logits
    torch.testing.assert_close(ours(**given).logits, expected, rtol=0, atol=1e-6)


BOTH = """
name: both
with: {length: 2}
rules:
  - match: inputs
    params: {P: {shape: [2 * length, width], init: normal(1)}}
    rewrite:
      embeds: "concat(tokens(P[:length]), embeds)"
      mask: extend(mask, length)
      decoder_embeds: "concat(tokens(P[length:]), decoder_embeds)"
      decoder_labels: extend(decoder_labels, length, -100)
"""


@pytest.mark.slow
@torch.no_grad()
def test_a_rule_of_ones_own_puts_tokens_before_the_decoders_text_too() -> None:
    given = batch(2, 5)
    given["decoder_input_ids"] = batch(2, 4)["input_ids"]
    given["labels"] = batch(2, 4)["labels"]
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**{**T5, "num_layers": 1})).eval()
    ours = ps.apply(ps.capture(model, inputs=given), ps.parse_rules(BOTH)).eval()
    first, second = ours.get_parameter("both.P").expand(2, -1, -1).split(2, 1)
    table = model.get_input_embeddings()
    expected = model(
        inputs_embeds=torch.cat((first, table(given["input_ids"])), 1),
        decoder_inputs_embeds=torch.cat((second, table(given["decoder_input_ids"])), 1),
        labels=F.pad(given["labels"], (2, 0), value=-100),
    )
    actual = ours(**given)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=0, atol=1e-6)
    del given["decoder_input_ids"]
    assert refusal(lambda: ours(**given)).code == "PSG305", "nothing to put them before"


class Takesless(nn.Module):
    """A language model that takes token ids and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11)

    def forward(self, input_ids: Tensor) -> Tensor:
        made: Tensor = self.head(self.table(input_ids))
        return made


def refusal(action: Any) -> SurgeryError:
    with pytest.raises(SurgeryError) as caught:
        action()
    return caught.value


@pytest.mark.slow
def test_what_cannot_be_lengthened_is_refused_by_name() -> None:
    ids = torch.ones(2, 4, dtype=torch.long)
    tokens = ps.capture(Takesless(), inputs={"input_ids": ids})
    error = refusal(lambda: ps.apply(tokens, "prompt_tuning"))
    assert (error.code, "inputs_embeds" in error.message) == ("PSG351", True)
    pictures = ps.capture(nn.Sequential(nn.Linear(3, 3)), inputs=(torch.ones(2, 3),))
    assert refusal(lambda: ps.apply(pictures, "prompt_tuning")).code == "PSG301"
    prompted = ps.apply(graph(), "prompt_tuning", length=4)
    given = batch(3, 7)
    square = torch.ones(3, 1, 7, 7, dtype=torch.bool)
    assert refusal(lambda: prompted(**given, attention_mask=square)).code == "PSG352"
    assert refusal(lambda: ps.fold(prompted)).code == "PSG401"
    with prompted.rows(["prompt_tuning", None, None]):
        assert refusal(lambda: prompted(**given)).code == "PSG313"


def test_peft_has_no_form_for_places_and_ensembles(tmp_path: Path) -> None:
    error = refusal(lambda: ps.to_peft(placed(), tmp_path / "places"))
    assert (error.code, "places" in error.message) == ("PSG510", True)
    ensemble = ps.apply(graph(), "prompt_ensemble", length=2)
    assert refusal(lambda: ps.to_peft(ensemble, tmp_path / "ensemble")).code == "PSG510"
    masked = ps.apply(captured("bert"), "prompt_tuning", length=2)
    error = refusal(lambda: ps.to_peft(masked, tmp_path / "task"))
    assert (error.code, "BertForMaskedLM" in error.message) == ("PSG510", True)


@pytest.mark.slow
def test_generation_with_a_prompt_is_the_originals_after_it() -> None:
    torch.manual_seed(0)
    settings = {
        **DECODER,
        "num_hidden_layers": 1,
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    ours = ps.apply(ps.capture(model), "prompt_tuning", length=4).eval()
    ids = batch(3, 7)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    ids = ids.masked_fill(mask == 0, 0)
    prompt = ours.get_parameter("prompt_tuning.P").expand(3, -1, -1)
    longer = {
        "inputs_embeds": torch.cat((prompt, model.get_input_embeddings()(ids)), 1),
        "attention_mask": F.pad(mask, (4, 0), value=1),
    }
    for way in ({}, {"num_beams": 2}):
        expected = model.generate(**longer, max_new_tokens=6, **way)
        for given in ({}, {"attention_mask": mask}):
            made = ours.generate(ids, max_new_tokens=6, **given, **way)
            assert torch.equal(made, torch.cat((ids, expected), 1)), way
    ensemble = ps.apply(ps.eject(ours), "prompt_ensemble", length=2)
    assert refusal(lambda: ensemble.generate(ids)).code == "PSG353"
