"""Prompt tuning and P-tuning on five architectures, with peft in the same process as the oracle.

The virtual tokens of an encoder-decoder are in its encoder; a classifier's head is trained too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

import peftsurgery as ps
from peftsurgery.surgery.model.operated import OperatedModel
from tests.parity.tasks import MODELS, classifier, graph, plain, texts
from tests.parity.training import both_train

LENGTH, HIDDEN = 4, 8
METHODS = ("prompt", "mlp", "lstm")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
]


@dataclass(frozen=True)
class Pair:
    """The same virtual tokens before the same model, in peft and here."""

    name: str
    method: str
    theirs: Any
    ours: OperatedModel

    def tensors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Every tensor of the encoder in peft's model, and the part of ours that it is."""
        encoder = self.theirs.prompt_encoder["default"]
        names = {p: f"p_tuning.{n}" for p, n in OURS[self.method].items()}
        if self.method == "prompt":
            names = {"embedding.weight": "default.P"}
        for theirs, name in names.items():
            for number, part in enumerate(theirs.split(" ")):
                mine = self.ours.get_parameter(name)
                grad = None if mine.grad is None else mine.grad
                both = " " in theirs
                piece = mine[number] if both else mine
                if grad is not None:
                    piece = piece.detach()
                    piece.grad = grad[number] if both else grad
                yield part, encoder.get_parameter(part), piece


def _layer(number: int, letters: tuple[str, ...]) -> dict[str, str]:
    """The names of one layer of torch's LSTM, both directions, and of ours."""
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return {
        f"lstm_head.{kind}_l{number} lstm_head.{kind}_l{number}_reverse": letter
        for kind, letter in zip(kinds, letters, strict=True)
    }


def _linears(*numbers: int) -> dict[str, str]:
    return {
        f"mlp_head.{number}.{kind}": f"{letter}{place}"
        for place, number in enumerate(numbers, 1)
        for kind, letter in (("weight", "W"), ("bias", "b"))
    }


OURS = {
    "prompt": {},
    "mlp": {"embedding.weight": "E", **_linears(0, 2, 4)},
    "lstm": {
        "embedding.weight": "E",
        **_layer(0, ("Wi", "Wh", "bi", "bh")),
        **_layer(1, ("Vi", "Vh", "ci", "ch")),
        **_linears(0, 2),
    },
}


def peft_model(name: str, method: str) -> Any:
    torch.manual_seed(1)
    common = {"task_type": MODELS[name], "num_virtual_tokens": LENGTH}
    if method == "prompt":
        return get_peft_model(plain(name), PromptTuningConfig(**common))
    config = PromptEncoderConfig(
        **common,
        encoder_hidden_size=HIDDEN,
        encoder_reparameterization_type=method.upper(),
    )
    return get_peft_model(plain(name), config)


@pytest.fixture(scope="module", params=[(n, m) for n in MODELS for m in METHODS], ids="-".join)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    name, method = request.param
    theirs = peft_model(name, method).eval()
    if method == "prompt":
        folder = tmp_path_factory.mktemp("adapter")
        theirs.save_pretrained(folder)
        return Pair(name, method, theirs, ps.from_peft(graph(name), folder).eval())
    rules = ["p_tuning"]
    settings = {"length": LENGTH, "hidden": HIDDEN, "lstm": method == "lstm"}
    settings["submodules"] = 2 if name == "t5" else 1
    if name == "bert-classifier":
        rules.append(HEAD)
    ours = ps.apply(graph(name), rules, name="p_tuning", **settings).eval()
    made = Pair(name, method, theirs, ours)
    with torch.no_grad():
        for _, value, mine in made.tensors():
            mine.copy_(value)
    return made


HEAD = ps.parse_rules(
    "name: head\nrules: [{match: parameter, where: {path: 'classifier.*'}, train: true}]"
)


def test_outputs_are_pefts_and_as_long(pair: Pair) -> None:
    given = texts(pair.name)
    ours, theirs = pair.ours(**given), pair.theirs(**given)
    assert type(ours) is type(theirs)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=0, atol=1e-6)
    before = graph(pair.name)(**given).logits
    moved = before - ours.logits[:, -before.shape[1] :]
    assert moved.abs().max() > 1e-3, "the prompt must have an effect"


def test_gradients_are_pefts(pair: Pair) -> None:
    for model in (pair.theirs, pair.ours):
        model.zero_grad()
        model(**texts(pair.name)).loss.backward()
    seen = 0
    for name, theirs, ours in pair.tensors():
        assert theirs.grad is not None, name
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-5, msg=name)
        seen += theirs.numel()
    head = sum(p.numel() for p in classifier().classifier.parameters())
    head = head if pair.name == "bert-classifier" else 0
    assert seen + head == sum(p.numel() for p in pair.ours.parameters() if p.requires_grad)


def test_twenty_adamw_steps_give_pefts_losses(pair: Pair) -> None:
    draw = partial(texts, pair.name)
    theirs, ours = both_train(pair.theirs, pair.ours, draw=draw)
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_what_peft_loads_from_our_files_computes_the_same(pair: Pair, tmp_path: Path) -> None:
    ps.to_peft(pair.ours, tmp_path / "ours")
    pair.theirs.save_pretrained(tmp_path / "theirs")
    ours, theirs = (
        load_file(tmp_path / d / "adapter_model.safetensors") for d in ("ours", "theirs")
    )
    torch.testing.assert_close(
        ours["prompt_embeddings"], theirs["prompt_embeddings"], rtol=0, atol=1e-6
    )
    again = PeftModel.from_pretrained(plain(pair.name), tmp_path / "ours").eval()
    given = texts(pair.name)
    expected = pair.theirs(**given).logits
    torch.testing.assert_close(again(**given).logits, expected, rtol=0, atol=1e-6)
    read = ps.from_peft(graph(pair.name), tmp_path / "theirs")
    torch.testing.assert_close(read(**given).logits, expected, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "bert-classifier"])
def test_padded_texts_and_embeddings_are_taken_as_peft_takes_them(name: str) -> None:
    theirs = peft_model(name, "prompt").eval()
    ours = ps.apply(graph(name), "prompt_tuning", length=LENGTH).eval()
    with torch.no_grad():
        ours.get_parameter("prompt_tuning.P").copy_(
            theirs.prompt_encoder["default"].embedding.weight
        )
    given = texts(name)
    mask = torch.ones_like(given["input_ids"])
    mask[0, 5:] = mask[1, :3] = 0
    expected = theirs(**given, attention_mask=mask).logits
    torch.testing.assert_close(
        ours(**given, attention_mask=mask).logits, expected, rtol=0, atol=1e-6
    )
    embeds = plain(name).get_input_embeddings()(given.pop("input_ids"))
    direct = ours(**given, inputs_embeds=embeds, attention_mask=mask)
    torch.testing.assert_close(direct.logits, expected, rtol=0, atol=1e-6)
