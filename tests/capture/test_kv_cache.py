"""How a model takes its cache, and what it tells it, differs between models and versions."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

import peftsurgery as ps
from peftsurgery.capture.generating import cache_argument, first_inputs
from tests.models.zoo import ZOO, ids

SMALL = {
    "vocab_size": 99,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
GENERATING = ["llama", "gpt2", "gptj", "opt", "bloom", "gemma2", "gpt_neo", "falcon_7b", "mixtral"]


def small() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


@pytest.mark.parametrize("name", GENERATING)
def test_the_caches_argument_is_the_one_that_generate_uses(name: str) -> None:
    model: Any = ZOO[name].build()
    given = [key for key, value in first_inputs(model).items() if isinstance(value, Cache)]
    assert [cache_argument(model)] == given


@pytest.mark.parametrize(("name", "has_one"), [("bert", False), ("vit", False), ("t5", True)])
def test_a_cache_is_looked_for_and_not_imagined(name: str, has_one: bool) -> None:
    model: Any = ZOO[name].build()
    names = ("past_key_values", "cache")  # transformers' before 5.24 and since
    named = [each for each in names if each in inspect.signature(model.forward).parameters]
    assert [cache_argument(model)] == (named if has_one else [None])
    assert cache_argument(torch.nn.Linear(2, 2)) is None


class Renamed(LlamaForCausalLM):
    """A model that takes its cache by an earlier name too, as models do for some versions."""

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, *args: Any, memory: Any = None, **kwargs: Any) -> Any:
        if memory is not None:
            kwargs[cache_argument(self)] = memory
        return super().forward(*args, **kwargs)


def test_a_cache_by_an_earlier_name_is_the_models_cache() -> None:
    model: Any = Renamed(LlamaConfig(**SMALL)).eval()
    captured = ps.capture(model, cache=True)
    mine, theirs = DynamicCache(config=model.config), DynamicCache(config=model.config)
    own = {str(cache_argument(model)): DynamicCache(config=model.config)}
    with torch.no_grad():
        for new in (5, 1, 1):
            fed = ids(2, new)
            expected = model(fed, memory=theirs, use_cache=True).logits
            assert torch.equal(captured(fed, memory=mine, use_cache=True).logits, expected)
            made = len(captured.captures)
            assert torch.equal(captured(fed, **own, use_cache=True).logits, expected)
            assert len(captured.captures) == made  # one capture serves both names
    assert mine.get_seq_length() == 7


class Choosing(DynamicLayer):
    """A layer of a cache that chooses by what the model tells it."""

    def update(self, keys: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        """Keep a key only if it is told to."""
        if kwargs["kwargs"]["keep"]:
            return super().update(keys, values)
        return keys, values


def telling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every model tell its cache more than keys and values, as those of today do."""
    update = Cache.update

    def told(self: Any, keys: Any, values: Any, index: int, *args: Any, **named: Any) -> Any:
        return update(self, keys, values, index, *args, **{**named, "kwargs": {"keep": keys}})

    monkeypatch.setattr(Cache, "update", told)


def test_what_a_model_tells_its_cache_may_be_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    with monkeypatch.context() as patch:
        telling(patch)
        captured = ps.capture(model, cache=True)
    expected = model.generate(ids(2, 5), max_new_tokens=4, do_sample=False)
    made = captured.generate(ids(2, 5), max_new_tokens=4, do_sample=False)
    assert torch.equal(made, expected)


def test_a_cache_that_reads_what_it_is_told_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    cache = DynamicCache(config=model.config)
    cache.layers = [Choosing()]
    with monkeypatch.context() as patch:
        telling(patch)
        captured = ps.capture(model)
        call = captured.call_of(ids(2, 5), **{str(cache_argument(model)): cache}, use_cache=True)
        captured.original_capture(call)
    with pytest.raises(ps.SurgeryError, match="beside keys and values") as caught:
        captured(ids(2, 5), **{str(cache_argument(model)): cache}, use_cache=True)
    assert caught.value.code == "PSG210"


@pytest.mark.parametrize(
    "read",
    [
        lambda told: told["keep"],
        lambda told: told.get("keep"),
        lambda told: "keep" in told,
        lambda told: bool(told),
        lambda told: len(told),
        lambda told: list(told),
        lambda told: {**told},
        lambda told: dict(told),
        lambda told: told == {},
        lambda told: told | {},
    ],
)
def test_what_is_withheld_cannot_be_read_in_any_way(read: Any) -> None:
    from peftsurgery.capture.withheld import Withheld

    with pytest.raises(ps.SurgeryError) as caught:
        read(Withheld())
    assert caught.value.code == "PSG210"
