"""Several adapters in one model, with peft in the same process as the oracle."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import Tensor

import peftsurgery as ps
from peftsurgery.surgery.model.operated import OperatedModel
from tests.models.captured import captured as classifier_of
from tests.models.zoo import ZOO
from tests.parity.models import SMALL, base, batch, captured, randomise

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter name 'a' should not be contained:UserWarning"),
]
RANKS = {"a": (4, 6), "b": (4, 2), "c": (4, 8), "wide": (6, 3)}
SAME = {"a": 0.7, "b": 0.9, "c": -0.4}


@dataclass(frozen=True)
class Pair:
    """The same adapters on the same model, in peft and here."""

    theirs: Any
    ours: OperatedModel


@cache
def pair(name: str, folder: Path) -> Pair:
    """Four adapters: three of one rank, all of different alpha."""
    theirs: Any = base(name)
    for adapter, (rank, alpha) in RANKS.items():
        targets = list(SMALL[name].targets)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
        if adapter == "a":
            theirs = get_peft_model(theirs, config, adapter_name=adapter)
        else:
            theirs.add_adapter(adapter, config)
    randomise(theirs, lambda parameter: "lora_" in parameter, scale=0.3)
    theirs.eval().save_pretrained(folder)
    ours: Any = captured(name)
    for adapter in RANKS:
        ours = ps.from_peft(ours, folder / adapter, name=adapter)
    return Pair(theirs, ours.eval())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


def logits(model: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**batch(6, 7), **more).logits
    return result


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_batch_of_mixed_rows_is_pefts(name: str, folder: Path) -> None:
    both = pair(name, folder / name)
    rows = ["a", None, "b", "wide", "a", "c"]
    theirs = logits(both.theirs, adapter_names=[row or "__base__" for row in rows])
    ours = logits(both.ours, adapters=rows)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    both.ours.deactivate()
    plain = logits(both.ours)
    assert torch.equal(ours[1], plain[1])
    assert (ours - plain)[[0, 2, 3, 4, 5]].abs().amax((1, 2)).min() > 0.01


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_active_adapter_is_pefts(name: str, folder: Path) -> None:
    both = pair(name, folder / name)
    for adapter in RANKS:
        both.theirs.set_adapter(adapter)
        with both.ours.only(adapter):
            theirs, ours = logits(both.theirs), logits(both.ours)
            assert both.ours.report.trainable == sum(
                p.numel() for p in both.theirs.parameters() if p.requires_grad
            )
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    with both.theirs.disable_adapter(), both.ours.only():
        torch.testing.assert_close(logits(both.ours), logits(both.theirs), rtol=0, atol=1e-6)


HOW: dict[str, tuple[dict[str, float], dict[str, Any]]] = {
    "peft_linear": (SAME, {}),
    "cat": ({"a": 0.7, "wide": -0.9, "c": 0.2}, {}),
    "svd": ({"a": 0.7, "wide": 0.5, "c": -0.3}, {"rank": 6}),
    "svd to rank 3": (SAME, {"rank": 3}),
    "svd clamped": (SAME, {"rank": 4, "clamp": 0.9}),
    "magnitude_prune": (SAME, {"density": 0.4}),
    "ties": (SAME, {"density": 0.6}),
    "ties by number": (SAME, {"density": 0.6, "majority": "frequency"}),
    "dare_linear": (SAME, {"density": 0.7}),
    "dare_ties": (SAME, {"density": 0.7}),
    "ties_svd": ({"a": 0.7, "wide": 0.5}, {"density": 0.5, "rank": 6}),
    "dare_linear_svd": ({"a": 0.7, "wide": 0.5}, {"density": 0.5, "rank": 6}),
}
THEIRS = {"rank": "svd_rank", "clamp": "svd_clamp", "majority": "majority_sign_method"}


def seeded(tuner: Any) -> None:
    """Let peft draw DARE's numbers from the same seed, after those of the new adapter's start."""
    inject = tuner.inject_adapter

    def inject_and_seed(*args: Any, **kwargs: Any) -> None:
        inject(*args, **kwargs)
        torch.manual_seed(3)

    tuner.inject_adapter = inject_and_seed


@pytest.mark.parametrize("how", list(HOW))
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_weighted_combination_is_pefts(name: str, how: str, folder: Path) -> None:
    both = pair(name, folder / name)
    weights, settings = HOW[how]
    kind = how.split(" ")[0]
    theirs = deepcopy(both.theirs)
    seeded(theirs.base_model)
    theirs.add_weighted_adapter(
        list(weights),
        list(weights.values()),
        "new",
        combination_type=kind.removeprefix("peft_"),
        **{THEIRS.get(key, key): value for key, value in settings.items()},
    )
    theirs.set_adapter("new")
    torch.manual_seed(3)
    both.ours.activate()
    ours = ps.combine(both.ours, weights, "new", kind, **settings)
    assert ours.active == tuple(n for n in (*RANKS, "new") if n not in weights)
    with ours.only("new"):
        assert ours.operations[-1].settings["rank"] == theirs.peft_config["new"].r
        torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=2e-6)
        assert (logits(ours) - logits(captured(name))).abs().max() > 0.01


@pytest.mark.parametrize("name", ["llama"])
def test_weighted_ia3_is_pefts(name: str, tmp_path: Path) -> None:
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    theirs: Any = get_peft_model(base(name), config, adapter_name="a")
    theirs.add_adapter("b", config)
    randomise(theirs, lambda parameter: "ia3_" in parameter, scale=0.3)
    theirs.eval().save_pretrained(tmp_path)
    ours: Any = captured(name)
    for adapter in ("a", "b"):
        ours = ps.from_peft(ours, tmp_path / adapter, name=adapter)
    theirs.add_weighted_adapter(["a", "b"], [0.3, 0.8], "new")
    theirs.set_adapter("new")
    combined = ps.combine(ours, {"a": 0.3, "b": 0.8}, "new", "peft_linear").eval()
    torch.testing.assert_close(logits(combined), logits(theirs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["bert"])
def test_heads_that_were_trained_are_the_rows_own_too(name: str, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"])
    theirs: Any = get_peft_model(ZOO[name].build(), config, adapter_name="a")
    theirs.add_adapter("b", config)
    own = ("lora_", "modules_to_save")
    randomise(theirs, lambda parameter: any(part in parameter for part in own), scale=0.3)
    theirs.eval().save_pretrained(tmp_path)
    ours: Any = classifier_of(name)
    for adapter in ("a", "b"):
        ours = ps.from_peft(ours, tmp_path / adapter, name=adapter)
        ours.deactivate()
    rows, inputs = ["a", None, "b", "a"], ZOO[name].inputs(4, 6)
    with torch.no_grad():
        expected = theirs(**inputs, adapter_names=[row or "__base__" for row in rows]).logits
        result = ours.eval()(**inputs, adapters=rows).logits
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
