"""Adapters that were trained after ``resize_token_embeddings``.

The oracle is peft in the same process: the base, resized as peft's users do it, with the adapter
that peft reads back.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer as Words
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import peftsurgery as ps
from peftsurgery.capture.builds import SEED
from peftsurgery.formats.pretrained import fold_to_directory
from peftsurgery.quiet import quiet

pytestmark = pytest.mark.filterwarnings("ignore")

OLD, NEW = 40, 43
QUERIES = ["q_proj", "v_proj"]
TOKENS = torch.tensor([[1, 2, 40, 42, 5], [3, 41, 7, 8, 9]])

# What is adapted or trained, whether the embeddings are saved with it, and the tables of an untied
# and of a tied base whose new rows are then in no file.
VARIANTS: dict[str, tuple[dict[str, Any], bool | str, list[str], list[str]]] = {
    "embeddings and head saved": ({}, True, [], []),
    "saved since the size is another": ({}, "auto", [], []),
    "nothing but LoRA": ({}, False, [], []),
    "both trained": ({"modules_to_save": ["embed_tokens", "lm_head"]}, "auto", [], []),
    "both trained and saved alone": (
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        False,
        [],
        [],
    ),
    "the embeddings trained": ({"modules_to_save": ["embed_tokens"]}, "auto", [], []),
    "only the embeddings": (
        {"modules_to_save": ["embed_tokens"]},
        False,
        ["lm_head.weight"],
        [],
    ),
    "only the head": (
        {"modules_to_save": ["lm_head"]},
        False,
        ["embed_tokens.weight"],
        [],
    ),
    "trained tied": (
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        "auto",
        [],
        [],
    ),
    "trained tied and saved alone": (
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        False,
        ["lm_head.weight"],
        [],
    ),
    "embedding LoRA": (
        {"target_modules": [*QUERIES, "embed_tokens"]},
        "auto",
        ["lm_head.weight"],
        [],
    ),
    "embedding LoRA alone": (
        {"target_modules": [*QUERIES, "embed_tokens"]},
        False,
        ["lm_head.weight", "embed_tokens.weight"],
        ["embed_tokens.weight"],
    ),
    "LoRA of both": ({"target_modules": [*QUERIES, "embed_tokens", "lm_head"]}, "auto", [], []),
    "LoRA of the head": (
        {"target_modules": [*QUERIES, "lm_head"]},
        "auto",
        ["embed_tokens.weight"],
        [],
    ),
    "tied LoRA": (
        {"target_modules": [*QUERIES, "embed_tokens"], "ensure_weight_tying": True},
        "auto",
        ["lm_head.weight"],
        [],
    ),
}


class SmallConfig(PreTrainedConfig):
    """The config of :class:`Small`."""

    model_type = "small"

    def __init__(
        self, vocab_size: int = OLD, tie_word_embeddings: bool = True, **rest: Any
    ) -> None:
        self.vocab_size = vocab_size
        super().__init__(tie_word_embeddings=tie_word_embeddings, **rest)


class Small(PreTrainedModel):
    """Tables of tokens and two linears between them, which are captured in no time."""

    config_class = SmallConfig
    base_model_prefix = "model"
    _tied_weights_keys: ClassVar = {"lm_head.weight": "embed_tokens.weight"}

    def __init__(self, config: SmallConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, 16)
        self.q_proj, self.v_proj = nn.Linear(16, 24), nn.Linear(24, 16)
        self.lm_head = nn.Linear(16, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.v_proj(torch.tanh(self.q_proj(self.embed_tokens(input_ids))))
        result: Tensor = self.lm_head(hidden)
        return result


KINDS: dict[type[PreTrainedModel], dict[str, Any]] = {
    Small: {},
    LlamaForCausalLM: {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The directory of a base of a class, whose embeddings are tied or not."""

    @cache
    def saved(tied: bool, kind: type[PreTrainedModel] = Small) -> Path:
        torch.manual_seed(0)
        config: Any = kind.config_class
        made = config(vocab_size=OLD, tie_word_embeddings=tied, **KINDS[kind])
        folder = tmp_path_factory.mktemp("base")
        kind(made).save_pretrained(folder)
        return folder

    return saved


def plain(base: Path) -> PreTrainedModel:
    """The base as it was saved."""
    says = json.loads((base / "config.json").read_text())["architectures"]
    (kind,) = (kind for kind in KINDS if kind.__name__ in says)
    with quiet():
        return kind.from_pretrained(base).eval()


def resized(base: Path, seed: int = SEED) -> PreTrainedModel:
    """The base with another vocabulary, as whoever loads such an adapter makes it."""
    model = plain(base)
    with quiet():
        torch.manual_seed(seed)
        model.resize_token_embeddings(NEW)
    return model


def trained(base: Path, folder: Path, case: str) -> None:
    """An adapter with values that show, saved by peft."""
    options, saved, *_ = VARIANTS[case]
    settings = {"target_modules": QUERIES, **options}
    theirs = get_peft_model(resized(base), LoraConfig(r=2, **settings))
    torch.manual_seed(1)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(folder, save_embedding_layers=saved)


def reloaded(base: Path, folder: Path, seed: int = SEED) -> Tensor:
    """What peft computes with the adapter, read back onto the resized base."""
    return logits(PeftModel.from_pretrained(resized(base, seed), folder).eval())


@torch.no_grad()
def logits(model: Any) -> Tensor:
    outputs = model(input_ids=TOKENS)
    result: Tensor = getattr(outputs, "logits", outputs)
    return result


@cache
def captured(base: Path) -> ps.GraphModel:
    return ps.capture(plain(base), inputs={"input_ids": TOKENS})


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("case", [c for c in VARIANTS if c != "nothing but LoRA"])
def test_an_adapter_of_a_resized_vocabulary_is_what_peft_reloads(
    case: str, tied: bool, bases: Callable[..., Path], tmp_path: Path
) -> None:
    base = bases(tied)
    trained(base, tmp_path / "adapter", case)
    wanted = reloaded(base, tmp_path / "adapter")
    graph = captured(base)
    before = {name: value.clone() for name, value in graph.state_dict().items()}

    ours = ps.from_peft(graph, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(ours), wanted, rtol=0, atol=1e-6)
    assert set(ours.source.build.lacking) == set(VARIANTS[case][3 if tied else 2])
    assert f"the vocabulary has {NEW} tokens, where the base's has {OLD}" in str(ours.report)
    assert graph.config.vocab_size == OLD
    assert all(torch.equal(value, before[name]) for name, value in graph.state_dict().items())


@pytest.mark.parametrize(
    ("case", "tied"),
    [
        ("embeddings and head saved", True),
        ("the embeddings trained", True),
        ("only the head", False),
        ("LoRA of both", False),
        ("tied LoRA", True),
    ],
)
def test_it_is_saved_loaded_and_written_for_peft_as_it_was_read(
    case: str, tied: bool, bases: Callable[..., Path], tmp_path: Path
) -> None:
    base = bases(tied)
    trained(base, tmp_path / "adapter", case)
    wanted = reloaded(base, tmp_path / "adapter")
    ours = ps.from_peft(captured(base), tmp_path / "adapter").eval()
    ours.save(tmp_path / "surgery")
    again = ps.load(tmp_path / "surgery", captured(base)).eval()
    assert torch.equal(logits(again), logits(ours))
    assert again.source.build == ours.source.build
    ps.to_peft(again, tmp_path / "ours")
    # the rows are in the file: those that the base was resized with do not count
    theirs = reloaded(base, tmp_path / "ours", seed=7)
    torch.testing.assert_close(theirs, wanted, rtol=0, atol=1e-6)


def tokenizer(base: Path, size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of so many words, beside a base; those that its table has not were added."""
    words = Words(WordLevel({f"w{number}": number for number in range(OLD)}, unk_token="w0"))
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    made.save_pretrained(base)
    made.add_tokens([f"<{number}>" for number in range(OLD, size)])
    made.chat_template = "{{ messages }}"
    return made


@pytest.mark.parametrize("saved", [True, False])
def test_a_fold_writes_the_new_size_and_the_adapters_tokenizer(
    saved: bool, bases: Callable[..., Path], tmp_path: Path
) -> None:
    """Without its rows, new tokens have those that resize_token_embeddings starts them with."""
    base, adapter = bases(True, LlamaForCausalLM), tmp_path / "adapter"
    case = "embeddings and head saved" if saved else "nothing but LoRA"
    trained(base, adapter, case)
    tokenizer(base, NEW).save_pretrained(adapter)
    wanted = reloaded(base, adapter)

    result = fold_to_directory(adapter, tmp_path / "folded", base=str(base), verify=True)
    again = LlamaForCausalLM.from_pretrained(tmp_path / "folded").eval()
    torch.testing.assert_close(logits(again), wanted, rtol=0, atol=1e-6)
    assert again.config.vocab_size == NEW
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    words = AutoTokenizer.from_pretrained(tmp_path / "folded")
    assert (len(words), words.chat_template) == (NEW, "{{ messages }}")
    assert f"the vocabulary has {NEW} tokens, where the base's has {OLD}" in result.notes
    lacking = [note for note in result.notes if "are in no file" in note]
    assert len(lacking) == (0 if saved else 1)


def test_the_tokenizer_of_a_changed_vocabulary_goes_out_with_the_adapter(
    bases: Callable[..., Path], tmp_path: Path
) -> None:
    base = bases(True)
    trained(base, tmp_path / "adapter", "embeddings and head saved")
    tokenizer(base, NEW).save_pretrained(tmp_path / "adapter")
    ps.from_peft(captured(base), tmp_path / "adapter").save(tmp_path / "surgery")
    ps.to_peft(ps.load(tmp_path / "surgery", captured(base)), tmp_path / "ours")
    words = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert (len(words), words.chat_template) == (NEW, "{{ messages }}")


def test_adapterhub_has_no_place_for_a_changed_vocabulary(
    bases: Callable[..., Path], tmp_path: Path
) -> None:
    base = bases(True)
    trained(base, tmp_path / "adapter", "embeddings and head saved")
    ours = ps.from_peft(captured(base), tmp_path / "adapter")
    with pytest.raises(ps.SurgeryError, match=f"PSG512: the vocabulary has {NEW} tokens"):
        ps.to_adapterhub(ours, tmp_path / "out")
    assert not (tmp_path / "out").exists()


TARGET = 30


class Translating(Small):
    """A model whose output has another vocabulary than its input."""

    _tied_weights_keys: ClassVar = {}

    def __init__(self, config: SmallConfig) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(16, TARGET, bias=False)


@pytest.mark.parametrize("rows", [TARGET, NEW])
@pytest.mark.parametrize(
    "options", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head"]}]
)
def test_a_table_of_another_length_is_compared_with_its_own_rows(
    rows: int, options: dict[str, Any], tmp_path: Path
) -> None:
    """And one whose rows nobody has is not made another length."""
    torch.manual_seed(0)
    model = Translating(SmallConfig(tie_word_embeddings=False)).eval()
    graph = ps.capture(model, inputs={"input_ids": TOKENS % OLD})
    model = copy.deepcopy(model)  # peft changes it in place
    if rows != TARGET:
        model.lm_head = nn.Linear(16, rows, bias=False)
    theirs = get_peft_model(model, LoraConfig(r=2, **{"target_modules": QUERIES, **options}))
    torch.manual_seed(1)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    tokenizer(tmp_path, NEW).save_pretrained(tmp_path / "adapter")  # of the input, which fits
    if rows != TARGET and "target_modules" in options:
        with pytest.raises(ps.SurgeryError, match=r"PSG219: .*'lm_head.weight' has 30 rows"):
            ps.from_peft(graph, tmp_path / "adapter")
        return
    ours = ps.from_peft(graph, tmp_path / "adapter").eval()
    assert ours.source.build.vocabulary == (None if rows == TARGET else NEW)
    wanted = theirs.eval()(input_ids=TOKENS % OLD)
    torch.testing.assert_close(ours(input_ids=TOKENS % OLD), wanted, rtol=0, atol=1e-6)


def test_what_a_combination_lost_is_still_told_on_another_vocabulary(
    bases: Callable[..., Path], tmp_path: Path
) -> None:
    base = bases(True)
    trained(base, tmp_path / "adapter", "nothing but LoRA")
    tokenizer(base, NEW).save_pretrained(tmp_path / "adapter")
    model = ps.apply(captured(base), "lora_all_linear", name="a", rank=2)
    model._lost["a"] = 0.25
    grown = ps.from_peft(model, tmp_path / "adapter", name="b")
    assert grown.source.build.vocabulary == NEW
    assert grown.report.lost == {"a": 0.25}
