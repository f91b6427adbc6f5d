"""Prefix tuning and P-Tuning v2 on five architectures, with peft in the same process as the oracle.

The prefixes were written by peft's own ``save_pretrained``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

import peftsurgery as ps
from peftsurgery.surgery.model.operated import OperatedModel
from tests.parity.models import randomise
from tests.parity.tasks import MODELS, graph, logits, plain, texts
from tests.parity.training import both_train

LENGTH = 3
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")


@dataclass(frozen=True)
class Pair:
    """The same prefix on the same model, in peft and here, and the directory it was read from."""

    name: str
    theirs: Any
    ours: OperatedModel
    folder: Path


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    name = request.param
    config = PrefixTuningConfig(task_type=MODELS[name], num_virtual_tokens=LENGTH)
    theirs = get_peft_model(plain(name), config).eval()
    randomise(theirs, lambda parameter: "prompt_encoder" in parameter, 0.5)
    folder = tmp_path_factory.mktemp("adapter")
    theirs.save_pretrained(folder)
    ours = ps.from_peft(graph(name), folder).eval()
    return Pair(name, theirs, ours, folder)


def in_our_parts(pair: Pair, whole: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each of our parameters, and its part of a tensor that lies as peft's does."""
    cuts = [cut for cut in pair.ours.cuts if cut.rule.params]
    shape = (cuts[0].sizes["kv_heads"], cuts[0].sizes["head_dim"])
    parts = whole.view(LENGTH, 2 * len(cuts), *shape)
    for layer, cut in enumerate(cuts):
        number = 2 * layer % len(cuts) if pair.name == "t5" else layer
        for place, letter in enumerate("KV"):
            full = cut.parameters[letter]
            yield full, pair.ours.get_parameter(full), parts[:, 2 * number + place]


def test_outputs_are_pefts(pair: Pair) -> None:
    inputs = texts(pair.name)
    torch.testing.assert_close(
        logits(pair.ours, inputs), logits(pair.theirs, inputs), rtol=0, atol=1e-6
    )
    changed = logits(pair.ours, inputs) - logits(graph(pair.name), inputs)
    assert changed.abs().max() > 1e-3, "the prefix must have an effect"


@pytest.mark.parametrize("pair", ["gpt2", "t5"], indirect=True)
def test_outputs_are_pefts_where_texts_are_padded(pair: Pair) -> None:
    inputs = texts(pair.name)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:] = 0
    inputs["attention_mask"] = mask
    seen = mask.bool() if MODELS[pair.name] == "CAUSAL_LM" else slice(None)
    ours, theirs = (logits(model, inputs)[seen] for model in (pair.ours, pair.theirs))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_gradients_are_pefts(pair: Pair) -> None:
    for model in (pair.theirs, pair.ours):
        model.zero_grad()
        model(**texts(pair.name)).loss.backward()
    whole = pair.theirs.prompt_encoder["default"].embedding.weight.grad
    for name, ours, theirs in in_our_parts(pair, whole):
        torch.testing.assert_close(ours.grad, theirs, rtol=0, atol=1e-5, msg=name)


def test_twenty_adamw_steps_give_pefts_losses(pair: Pair) -> None:
    draw = partial(texts, pair.name)
    theirs, ours = both_train(pair.theirs, pair.ours, draw=draw, rate=3e-2)
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_what_is_written_is_what_was_read_and_peft_loads_it(pair: Pair, tmp_path: Path) -> None:
    ps.to_peft(pair.ours, tmp_path)
    before, after = (load_file(d / "adapter_model.safetensors") for d in (pair.folder, tmp_path))
    assert after.keys() == before.keys()
    assert all(after[name].shape == before[name].shape for name in before)
    if pair.name != "t5":  # peft does not use all of an encoder-decoder's
        assert all(torch.equal(after[name], before[name]) for name in before)
    again = PeftModel.from_pretrained(plain(pair.name), tmp_path).eval()
    inputs = texts(pair.name)
    torch.testing.assert_close(logits(again, inputs), logits(pair.ours, inputs), rtol=0, atol=1e-6)


def test_it_is_ejected_and_not_folded(pair: Pair) -> None:
    assert ps.eject(pair.ours) is graph(pair.name)
    with pytest.raises(ps.SurgeryError) as caught:
        ps.fold(pair.ours)
    assert caught.value.code == "PSG401"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_prefix_rule_may_call_its_settings_as_it_likes(name: str, tmp_path: Path) -> None:
    file = Path(__file__).parents[2] / "rules" / "prefix_tuning.yaml"
    text = re.sub(r"\blength\b", "tokens_added", file.read_text())
    mine = ps.parse_rules(text.replace("name: prefix_tuning", "name: mine"))
    assert "tokens_added" in mine.with_
    assert "length" not in mine.with_
    settings = {"shift": True}
    ours = ps.apply(graph(name), mine, name="a", settings=settings, tokens_added=3)
    theirs = ps.apply(graph(name), "prefix_tuning", name="a", settings=settings, length=3)
    values = theirs.learnt()
    with torch.no_grad():
        for key, value in ours.learnt().items():
            value.copy_(values[key])
    for model, folder in ((ours, "ours"), (theirs, "theirs")):
        ps.to_peft(model, tmp_path / folder)
    files = [load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    configs = [(tmp_path / n / "adapter_config.json").read_text() for n in ("ours", "theirs")]
    assert configs[0] == configs[1]
