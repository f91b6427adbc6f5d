"""IA3 on five architectures, with peft in the same process as the oracle.

``default`` are the modules that peft chooses for the architecture, ``paper`` those of the rule:
keys, values, and what enters the second layer of the feed-forward.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model

import peftsurgery as ps
from peftsurgery.errors import SurgeryError
from peftsurgery.surgery.model.operated import OperatedModel
from tests.parity.models import base, batch, captured, randomise
from tests.parity.training import assert_written_as_read, both_train, logits

PAPER: dict[str, dict[str, Any]] = {
    "llama": {
        "target_modules": ["k_proj", "v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    },
    "qwen3": {
        "target_modules": ["k_proj", "v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    },
    "bert": {
        "target_modules": r".*\.(key|value)|.*\.\d+\.output\.dense",
        "feedforward_modules": r".*\.\d+\.output\.dense",
    },
    "t5": {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]},
}
NAMES = ("llama", "qwen3", "bert", "t5", "gpt2")
CASES = [(name, "default") for name in NAMES] + [(name, "paper") for name in ("bert", "qwen3")]
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")


@dataclass(frozen=True)
class Pair:
    """The same adapter on the same model, in peft and here, and the directory it was read from."""

    name: str
    theirs: Any
    ours: OperatedModel
    folder: Path


def made(name: str, modules: str, folder: Path) -> Pair:
    config = IA3Config(**(PAPER[name] if modules == "paper" else {}))
    theirs = get_peft_model(base(name), config).eval()
    randomise(theirs, lambda parameter: "ia3_" in parameter, 0.3)
    theirs.save_pretrained(folder)
    return Pair(name, theirs, ps.from_peft(captured(name), folder).eval(), folder)


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case) for case in CASES])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return made(*request.param, tmp_path_factory.mktemp("adapter"))


def test_outputs_are_pefts(pair: Pair) -> None:
    torch.testing.assert_close(logits(pair.ours), logits(pair.theirs), rtol=0, atol=1e-6)
    assert (logits(pair.ours) - logits(captured(pair.name))).abs().max() > 1e-3


def test_gradients_are_pefts(pair: Pair) -> None:
    for model in (pair.theirs, pair.ours):
        model.zero_grad()
        model(**batch()).loss.backward()
    theirs = {
        name.removeprefix("base_model.model.").removesuffix(".ia3_l.default"): parameter
        for name, parameter in pair.theirs.named_parameters()
        if parameter.requires_grad
    }
    ours = {n: p for n, p in pair.ours.named_parameters() if p.requires_grad}
    assert {name.removesuffix(".default.s") for name in ours} == set(theirs)
    for name, parameter in theirs.items():
        mine = ours[f"{name}.default.s"].grad
        torch.testing.assert_close(mine, parameter.grad, rtol=0, atol=1e-5, msg=name)


def test_twenty_adamw_steps_give_pefts_losses(pair: Pair) -> None:
    ours, theirs = both_train(pair.ours, pair.theirs)
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_fold_is_pefts_merge(pair: Pair) -> None:
    merged, folded = deepcopy(pair.theirs).merge_and_unload(), ps.fold(pair.ours)
    assert type(folded) is type(merged)
    for name, weight in merged.named_parameters():
        torch.testing.assert_close(folded.get_parameter(name), weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(folded), logits(pair.ours), rtol=0, atol=5e-6)


def test_what_is_written_is_what_was_read_and_peft_loads_it(pair: Pair, tmp_path: Path) -> None:
    assert_written_as_read(pair.ours, pair.folder, tmp_path, base(pair.name))


@pytest.mark.parametrize("name", NAMES)
def test_the_rule_finds_what_peft_is_told_by_name(name: str, tmp_path: Path) -> None:
    ours = ps.apply(captured(name), "ia3").eval()
    randomise(ours, lambda parameter: parameter.endswith(".ia3.s"), 0.3)
    ps.to_peft(ours, tmp_path)
    theirs = PeftModel.from_pretrained(base(name), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-6)
    wrapped = {
        n.removeprefix("base_model.model.")
        for n, m in theirs.named_modules()
        if hasattr(m, "ia3_l")
    }
    assert wrapped == {match["module"] for match in ours.report.matches}
    assert ps.eject(ours) is captured(name)
    ours.save(tmp_path / "saved")
    assert torch.equal(logits(ps.load(tmp_path / "saved", captured(name))), logits(ours))


def test_adapterhubs_placement_scales_before_the_activation() -> None:
    ours = ps.apply(captured("bert"), "ia3", outputs=["attn.k", "attn.v", "ffn.up"], inputs=[])
    shapes = {match["role"]: ours.report.added[match["added"][0]] for match in ours.report.matches}
    assert shapes == {"attn.k": [32, 1], "attn.v": [32, 1], "ffn.up": [48, 1]}
    randomise(ours, lambda parameter: parameter.endswith(".ia3.s"), 0.3)
    plain = base("bert")
    for match in ours.report.matches:
        scale = ours.get_parameter(match["added"][0]).detach()
        module = plain.get_submodule(match["module"])
        module.register_forward_hook(lambda _, __, y, scale=scale: y * scale[:, 0])
    torch.testing.assert_close(logits(ours.eval()), logits(plain), rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(ps.fold(ours)), logits(ours), rtol=0, atol=5e-6)


def test_a_list_that_contradicts_the_tensors_is_refused(tmp_path: Path) -> None:
    pair = made("llama", "default", tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"down_proj"\n  ],\n  "inf', '"k_proj"\n  ],\n  "inf'))
    with pytest.raises(SurgeryError, match="feedforward_modules") as caught:
        ps.from_peft(captured(pair.name), tmp_path)
    assert caught.value.code == "PSG508"


def test_biases_beside_ia3_have_no_form_in_peft(tmp_path: Path) -> None:
    both = ps.apply(captured("bert"), ["ia3", "bitfit"], name="default", matched="ia3")
    with pytest.raises(SurgeryError) as caught:
        ps.to_peft(both, tmp_path)
    assert caught.value.code == "PSG510"
