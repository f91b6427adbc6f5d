"""LoRA, rsLoRA and DoRA on six architectures, with peft in the same process as the oracle.

The adapters are random and were written by peft's own ``save_pretrained``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import peftsurgery as ps
from peftsurgery.surgery.model.operated import OperatedModel
from tests.parity.models import SMALL, base, batch, captured, randomise
from tests.parity.training import (
    assert_folded_as_merged,
    assert_written_as_read,
    both_train,
    logits,
)

METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")

CASES = [
    (name, targets, method)
    for name in SMALL
    for targets in ("qv", "all-linear")
    for method in METHODS
]
OURS = {"lora_A.default.weight": "A", "lora_B.default.weight": "B"}
OURS["lora_magnitude_vector.default.weight"] = "m"


@dataclass(frozen=True)
class Pair:
    """The same adapter on the same model, in peft and here, and the directory it was read from."""

    name: str
    theirs: Any
    ours: OperatedModel
    folder: Path


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case) for case in CASES])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    name, targets, method = request.param
    modules = list(SMALL[name].targets) if targets == "qv" else targets
    config = LoraConfig(r=4, lora_alpha=6, target_modules=modules, **METHODS[method])
    theirs = get_peft_model(base(name), config).eval()
    randomise(theirs, lambda parameter: "lora_" in parameter)
    folder = tmp_path_factory.mktemp("adapter")
    theirs.save_pretrained(folder)
    ours = ps.from_peft(captured(name), folder).eval()
    return Pair(name, theirs, ours, folder)


def both(theirs: Any, ours: OperatedModel) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every adapter tensor of peft's model and ours, found by the names that each gives it."""
    for name, parameter in theirs.named_parameters():
        for ending, letter in OURS.items():
            if name.endswith(ending):
                module = name.removeprefix("base_model.model.").removesuffix(f".{ending}")
                yield name, parameter, ours.get_parameter(f"{module}.default.{letter}")


def test_outputs_are_pefts(pair: Pair) -> None:
    torch.testing.assert_close(logits(pair.ours), logits(pair.theirs), rtol=0, atol=1e-6)
    changed = logits(pair.ours) - logits(captured(pair.name))
    assert changed.abs().max() > 0.01, "the adapter must have an effect"


def test_gradients_of_every_adapter_tensor_are_pefts(pair: Pair) -> None:
    for model in (pair.theirs, pair.ours):
        model.zero_grad()
        model(**batch()).loss.backward()
    seen = 0
    for name, theirs, ours in both(pair.theirs, pair.ours):
        assert theirs.grad is not None, name
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-6, msg=name)
        seen += 1
    trained = [p for p in pair.ours.parameters() if p.requires_grad]
    assert seen == len(trained) == sum(p.requires_grad for p in pair.theirs.parameters())


def test_twenty_adamw_steps_give_pefts_losses(pair: Pair) -> None:
    theirs, ours = both_train(pair.theirs, pair.ours)
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_fold_is_pefts_merge(pair: Pair) -> None:
    assert_folded_as_merged(pair.ours, pair.theirs)


def test_what_is_written_is_what_was_read_and_peft_loads_it(pair: Pair, tmp_path: Path) -> None:
    assert_written_as_read(pair.ours, pair.folder, tmp_path, base(pair.name))
