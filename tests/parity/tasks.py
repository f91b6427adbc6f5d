"""Models with the tasks that methods of virtual tokens are compared with peft on."""

from __future__ import annotations

import inspect
from copy import deepcopy
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import peftsurgery as ps
from tests.parity.models import SIZES, base, batch, captured, randomise

LABELS = 3
PAST = "past_key_values"
MODELS = {
    "llama": "CAUSAL_LM",
    "gpt2": "CAUSAL_LM",
    "bert-classifier": "SEQ_CLS",
    "t5": "SEQ_2_SEQ_LM",
    "qwen3": "CAUSAL_LM",
}
"""Each model's task, as peft calls it."""


@cache
def classifier() -> nn.Module:
    """A BERT that tells texts apart; not to be changed."""
    torch.manual_seed(0)
    settings = {**SIZES, "num_labels": LABELS, "hidden_dropout_prob": 0.0}
    config = transformers.BertConfig(**settings, attention_probs_dropout_prob=0.0)
    model = transformers.BertForSequenceClassification(config).eval()
    randomise(model, lambda name: True, 0.02)
    return model


def plain(name: str) -> nn.Module:
    """A copy of the model, to be wrapped and changed by peft, which may hand it a cache."""
    model = deepcopy(classifier()) if name == "bert-classifier" else base(name)
    model.config.use_cache = True
    if name == "bert-classifier":
        declare_past(model.get_submodule("bert"))
    return model


def declare_past(backbone: nn.Module) -> None:
    """Let a forward declare the name by which peft 0.21 hands over a prefix.

    transformers 5.24 renamed that argument. It takes the earlier name still but declares it no
    longer, and peft looks for it there before it runs a classifier.
    """
    forward = backbone.forward
    signature = inspect.signature(forward)
    if PAST in signature.parameters:
        return
    *others, last = signature.parameters.values()
    past = inspect.Parameter(PAST, inspect.Parameter.KEYWORD_ONLY, default=None)

    def declaring(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    vars(declaring)["__signature__"] = signature.replace(parameters=[*others, past, last])
    backbone.forward = declaring


@cache
def graph(name: str) -> ps.GraphModel:
    """The captured model; not to be changed."""
    if name != "bert-classifier":
        return captured(name)
    return ps.capture(classifier(), inputs=texts(name, 2, 5))


def texts(name: str, rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Token ids and what the model learns from them, without padding."""
    made = batch(rows, length)
    if name == "bert-classifier":
        made["labels"] = made["labels"][:, 0] % LABELS
    return made


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The logits of a batch, without gradients."""
    with torch.no_grad():
        result: Tensor = model(**inputs).logits
    return result
