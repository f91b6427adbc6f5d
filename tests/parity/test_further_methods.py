"""LoHa, LoKr, OFT and LoRA with a bias, with peft in the same process as the oracle.

The adapters are random and were written by peft's own ``save_pretrained``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    TrainableTokensConfig,
    get_peft_model,
)

import peftsurgery as ps
from peftsurgery.surgery.model.operated import OperatedModel
from tests.parity.models import base, captured, randomise
from tests.parity.training import (
    assert_folded_as_merged,
    assert_written_as_read,
    both_train,
    logits,
)

TOKENS = [*range(60, 0, -2)]
# The models: one with biases, one with a fused projection held as (in, out), one without biases.
CASES: dict[str, tuple[str, Any]] = {
    "loha": ("opt", LoHaConfig(r=3, alpha=6, target_modules=["q_proj", "fc2"])),
    "loha_patterns": (
        "llama",
        LoHaConfig(
            r=3,
            alpha=6,
            target_modules=["q_proj", "v_proj"],
            rank_pattern={"v_proj": 2},
            alpha_pattern={"layers.1.self_attn.q_proj": 5},
        ),
    ),
    "lokr": ("llama", LoKrConfig(r=2, alpha=6, target_modules=["q_proj", "v_proj", "up_proj"])),
    "lokr_both_kinds": (
        "opt",
        LoKrConfig(r=3, alpha=6, target_modules=["q_proj", "fc1"], decompose_factor=5),
    ),
    "lokr_full": ("opt", LoKrConfig(r=9, alpha=6, target_modules=["fc1"], decompose_factor=16)),
    "oft": ("llama", OFTConfig(oft_block_size=8, target_modules=["q_proj", "down_proj"])),
    "oft_nearest": ("opt", OFTConfig(oft_block_size=10, target_modules=["k_proj", "fc2"])),
    "lora_bias": (
        "opt",
        LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "fc1"], lora_bias=True),
    ),
    "tokens": ("llama", TrainableTokensConfig(token_indices=TOKENS)),
    "tokens_tied": ("opt", TrainableTokensConfig(token_indices=TOKENS)),
    "lora_tokens": (
        "llama",
        LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=TOKENS),
    ),
    "lora_tokens_of_head": (
        "llama",
        LoraConfig(
            r=4,
            target_modules=["q_proj"],
            trainable_token_indices={"embed_tokens": TOKENS, "lm_head": [2]},
        ),
    ),
    "lora_tokens_tied": (
        "opt",
        LoraConfig(
            r=4,
            target_modules=["q_proj"],
            trainable_token_indices={"embed_tokens": TOKENS, "lm_head": TOKENS},
        ),
    ),
    "lora_bias_unbiased": ("llama", LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True)),
}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@dataclass(frozen=True)
class Read:
    """The same adapter on the same model, in peft and here, and the directory it was read from."""

    case: str
    theirs: Any
    ours: OperatedModel
    folder: Path


@pytest.fixture(scope="module", params=CASES)
def read(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Read:
    name, config = CASES[request.param]
    theirs = get_peft_model(base(name), config).eval()
    trained = {n for n, p in theirs.named_parameters() if p.requires_grad}
    randomise(theirs, lambda parameter: parameter in trained)
    folder = tmp_path_factory.mktemp("adapter")
    theirs.save_pretrained(folder)
    return Read(request.param, theirs, ps.from_peft(captured(name), folder).eval(), folder)


def test_outputs_are_pefts(read: Read) -> None:
    torch.testing.assert_close(logits(read.ours), logits(read.theirs), rtol=0, atol=2e-6)
    changed = logits(read.ours) - logits(captured(CASES[read.case][0]))
    assert changed.abs().max() > 0.01, "the adapter must have an effect"


def test_twenty_adamw_steps_give_pefts_losses(read: Read) -> None:
    theirs, ours = both_train(read.theirs, read.ours)
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_what_is_written_is_what_was_read_and_peft_loads_it(read: Read, tmp_path: Path) -> None:
    assert_written_as_read(read.ours, read.folder, tmp_path, base(CASES[read.case][0]))


def test_fold_is_pefts_merge(read: Read) -> None:
    if read.case != "lora_bias_unbiased":
        assert_folded_as_merged(read.ours, read.theirs)
        return
    # nothing of the plain model holds such a bias: peft refuses to merge it as well
    with pytest.raises(ps.SurgeryError, match="PSG"):
        ps.fold(read.ours)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (OFTConfig(oft_block_size=8, target_modules=["q_proj"], coft=True), "coft"),
        (OFTConfig(oft_block_size=8, target_modules=["q_proj"], block_share=True), "block_share"),
        (
            OFTConfig(oft_block_size=8, target_modules=["q_proj"], use_cayley_neumann=False),
            "use_cayley_neumann",
        ),
        (LoKrConfig(r=1, target_modules=["q_proj"], decompose_both=True), "decompose_both"),
        (LoHaConfig(r=3, target_modules=["q_proj"], rank_dropout=0.1), "rank_dropout"),
    ],
)
def test_what_the_pages_do_not_say_is_refused_by_its_key(
    config: Any, key: str, tmp_path: Path
) -> None:
    get_peft_model(base("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(ps.SurgeryError, match=f"PSG504: .*{key}"):
        ps.from_peft(captured("llama"), tmp_path)
