"""AdaLoRA on five architectures, with peft in the same process as the oracle, penalty included.

What wraps peft's tuner leaves the penalty out unless its config has a task, so the tuner is called.
"""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import peftsurgery as ps
from peftsurgery.errors import SurgeryError
from peftsurgery.surgery.model.operated import OperatedModel
from tests.parity.models import SMALL, base, batch, captured, randomise
from tests.parity.test_variants import Convolutions
from tests.parity.training import (
    assert_folded_as_merged,
    assert_written_as_read,
    both_train,
    logits,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern:RuntimeWarning"),
]
NAMES = ("llama", "gpt2", "bert", "t5", "qwen3")
LETTERS = {f"lora_{letter}.default": letter for letter in "ABE"}


@dataclass(frozen=True)
class Pair:
    """The same adapter on the same model, in peft and here, and the directory it was read from."""

    name: str
    theirs: Any
    ours: OperatedModel
    folder: Path


def config_for(name: str) -> AdaLoraConfig:
    targets = list(SMALL[name].targets)
    return AdaLoraConfig(init_r=6, target_r=1, lora_alpha=8, total_step=9, target_modules=targets)


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    name = request.param
    theirs = get_peft_model(base(name), config_for(name)).eval()
    randomise(theirs, lambda parameter: "lora_" in parameter, 0.2)
    folder = tmp_path_factory.mktemp("adapter")
    theirs.save_pretrained(folder)
    return Pair(name, theirs, ps.from_peft(captured(name), folder).eval(), folder)


def test_outputs_are_pefts(pair: Pair) -> None:
    torch.testing.assert_close(logits(pair.ours), logits(pair.theirs), rtol=0, atol=1e-6)
    assert (logits(pair.ours) - logits(captured(pair.name))).abs().max() > 0.01


def test_gradients_of_loss_and_penalty_are_pefts(pair: Pair) -> None:
    for model in (pair.theirs.base_model.train(), pair.ours.train()):
        model.zero_grad()
        model(**batch()).loss.backward()
        model.eval()
    seen = 0
    for name, theirs in pair.theirs.named_parameters():
        ending = next((e for e in LETTERS if name.endswith(e)), None)
        if ending is not None:
            module = name.removeprefix("base_model.model.").removesuffix(f".{ending}")
            ours = pair.ours.get_parameter(f"{module}.default.{LETTERS[ending]}")
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-5, msg=name)
            seen += 1
    assert seen == sum(p.requires_grad for p in pair.ours.parameters())


def test_twenty_adamw_steps_give_pefts_losses(pair: Pair) -> None:
    theirs, ours = both_train(pair.theirs.base_model, pair.ours)
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_fold_is_pefts_merge(pair: Pair) -> None:
    assert_folded_as_merged(pair.ours, pair.theirs)


def test_what_is_written_is_what_was_read_and_peft_loads_it(pair: Pair, tmp_path: Path) -> None:
    assert_written_as_read(pair.ours, pair.folder, tmp_path, base(pair.name))


@pytest.fixture(scope="module")
def allocated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that peft trained and took ranks away from, at one module all of them."""
    theirs: Any = get_peft_model(base("llama"), config_for("llama")).train()
    optimizer = torch.optim.AdamW((p for p in theirs.parameters() if p.requires_grad), lr=3e-3)
    for step in range(10):
        theirs.base_model(**batch()).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("allocated")
    theirs.save_pretrained(folder)
    return folder


def test_ranks_that_were_taken_away_are_read_and_written(allocated: Path, tmp_path: Path) -> None:
    ours = ps.from_peft(captured("llama"), allocated).eval()
    theirs = PeftModel.from_pretrained(base("llama"), allocated).eval()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-6)
    assert (logits(ours) - logits(captured("llama"))).abs().max() > 1e-4
    assert {p.shape[0] for n, p in ours.learnt().items() if n.endswith("E")} == {6}

    ps.to_peft(ours, tmp_path)
    config, written = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (allocated, tmp_path)
    )
    assert written["rank_pattern"] == config["rank_pattern"]
    assert any(not any(kept) for kept in written["rank_pattern"].values())
    before, after = (load_file(d / "adapter_model.safetensors") for d in (allocated, tmp_path))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    again = PeftModel.from_pretrained(base("llama"), tmp_path).eval()
    assert torch.equal(logits(again), logits(theirs))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_convolutions_and_linears_in_one_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Convolutions().eval()
    config = AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=8, total_step=9, target_modules=["first", "second", "head"]
    )
    theirs: Any = get_peft_model(deepcopy(module), config).eval()
    randomise(theirs, lambda name: "lora_" in name, 0.2)
    theirs.base_model.peft_config["default"].rank_pattern = {
        f"{name}.lora_E.default": [True, name != "head", False, True]
        for name in ("first", "second", "head")
    }
    theirs.base_model.rankallocator.mask_using_rank_pattern(
        theirs.base_model.model, theirs.base_model.peft_config["default"].rank_pattern
    )
    theirs.save_pretrained(tmp_path / "theirs")
    images, more = torch.randn(2, 3, 12, 9), torch.randn(5, 3, 14, 10)
    ours = ps.from_peft(ps.capture(module, (images,)), tmp_path / "theirs").eval()
    torch.testing.assert_close(ours(more), theirs(more), rtol=0, atol=1e-6)
    torch.testing.assert_close(ps.fold(ours)(more), theirs(more), rtol=0, atol=2e-6)
    letters = {"A": lambda p: p @ p.T, "B": lambda p: p.T @ p}
    squares = [letters[n[-1]](p) for n, p in ours.learnt().items() if n[-1] in letters]
    lengths = [torch.norm(square - torch.eye(4), p="fro") for square in squares]
    torch.testing.assert_close(ours.penalty(), 0.5 * torch.stack(lengths).mean())

    ps.to_peft(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(deepcopy(module), tmp_path / "ours").eval()
    torch.testing.assert_close(again(more), ours(more), rtol=0, atol=1e-6)


Q = "model.layers.0.self_attn.q_proj.lora_E"


@pytest.mark.parametrize(
    ("pattern", "code"),
    [
        ({Q.replace("q_proj", "qproj"): [True] * 6}, "PSG508"),
        ({Q: 3}, "PSG503"),
        ({Q: [1, 0, 1, 0, 1, 0]}, "PSG503"),
        ({Q: [True, False, True]}, "PSG507"),
    ],
)
def test_a_pattern_that_does_not_fit_is_refused(
    allocated: Path, tmp_path: Path, pattern: dict[str, Any], code: str
) -> None:
    config = json.loads((allocated / "adapter_config.json").read_text())
    config["rank_pattern"] |= pattern
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        load_file(allocated / "adapter_model.safetensors"), tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(SurgeryError) as refusal:
        ps.from_peft(captured("llama"), tmp_path)
    assert refusal.value.code == code


def test_an_adapter_without_its_number_of_steps_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=r"PSG510.*how many steps"):
        ps.to_peft(ps.apply(captured("llama"), "adalora"), tmp_path)
