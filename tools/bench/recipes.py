"""Every shipped method with the learning rate and the settings it is measured with, in one table.

``peft`` names peft's config of the same method and its settings, where peft has the method and can
train it on an encoder. ``rules`` are the shipped rules, if they are not called like the row, and
``before`` the names of Pfeiffer's adapters that are trained first; ``without`` are outputs that an
encoder does not have and that a rule is not to rewrite. ``beside`` is printed with the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tools.bench.task import STEPS

FULL = "full fine-tuning"
CLOSE = ("lora_qv", "lora_all_linear", "adalora", "pfeiffer", "prefix_tuning", "prefix_tuning_mlp")
"""The methods that have to come within two points of full fine-tuning, or say why they do not."""

QV = {"target_modules": ["query", "value"]}
LORA = {"r": 8, "lora_alpha": 16, **QV}
LINEARS = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
BUDGET = {"total_steps": STEPS, "initial_steps": STEPS // 6, "final_steps": STEPS // 3}


@dataclass(frozen=True)
class Recipe:
    """How a method is trained: its rate, its settings, and peft's own form of it."""

    rate: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    peft: tuple[str, Mapping[str, Any]] | None = None
    rules: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    beside: str = ""


RECIPES: Mapping[str, Recipe] = {
    FULL: Recipe(2e-4, beside="every parameter of the plain model"),
    "lora_qv": Recipe(3e-3, peft=("LoraConfig", LORA)),
    "lora_attention": Recipe(5e-3),
    "lora_all_linear": Recipe(2e-3, peft=("LoraConfig", LINEARS)),
    "lora_embedding": Recipe(3e-3),
    "lora_plus": Recipe(2e-3, rules=("lora_qv",), beside="lora_qv; B learns 16 times as fast"),
    "rslora": Recipe(2e-3, peft=("LoraConfig", {**LORA, "use_rslora": True})),
    "dora": Recipe(3e-3, peft=("LoraConfig", {**LORA, "use_dora": True})),
    "lora_bias": Recipe(3e-3, peft=("LoraConfig", {**LORA, "lora_bias": True})),
    "loha": Recipe(5e-3, peft=("LoHaConfig", {"r": 8, "alpha": 8, **QV})),
    "lokr": Recipe(5e-3, peft=("LoKrConfig", {"r": 8, "alpha": 8, **QV})),
    "oft": Recipe(3e-3, peft=("OFTConfig", {"oft_block_size": 32, **QV})),
    "trainable_tokens": Recipe(
        1e-2,
        {"tokens": [101, 102]},
        ("TrainableTokensConfig", {"token_indices": [101, 102]}),
        beside="[CLS] and [SEP] alone",
    ),
    "pissa": Recipe(
        2e-3, peft=("LoraConfig", {**LORA, "lora_alpha": 8, "init_lora_weights": "pissa"})
    ),
    "olora": Recipe(
        2e-3, peft=("LoraConfig", {**LORA, "lora_alpha": 8, "init_lora_weights": "olora"})
    ),
    "adalora": Recipe(
        2e-2,
        {"rank": 12, "target": 8, "interval": 5, **BUDGET},
        (
            "AdaLoraConfig",
            {
                "init_r": 12,
                "target_r": 8,
                "deltaT": 5,
                "lora_alpha": 8,
                "target_modules": "all-linear",
                "exclude_modules": ["pooler.dense"],
            },
        ),
        beside="peft's leaves out the pooler, which gets no gradient here, and adds its penalty "
        "only to a loss that the model itself returns",
    ),
    "qlora": Recipe(3e-3, peft=("LoraConfig", LINEARS), beside="the base in four bits"),
    "bitfit": Recipe(3e-3),
    "ia3": Recipe(2e-2, peft=("IA3Config", {})),
    "houlsby": Recipe(5e-3),
    "pfeiffer": Recipe(5e-3),
    "parallel_adapter": Recipe(1e-3),
    "adapter_drop": Recipe(5e-3),
    "adapter_fusion": Recipe(
        5e-4,
        {"adapters": ["first", "second"]},
        before=("first", "second"),
        beside="over two of Pfeiffer's, each trained before on half of the texts",
    ),
    "prefix_tuning": Recipe(1e-1, peft=("PrefixTuningConfig", {"num_virtual_tokens": 20})),
    "prefix_tuning_mlp": Recipe(2e-4),
    "p_tuning_v2": Recipe(1e-1),
    "mam_adapter": Recipe(5e-4),
    "unipelt": Recipe(1e-3),
    "prompt_tuning": Recipe(1e-2, peft=("PromptTuningConfig", {"num_virtual_tokens": 20})),
    "prompt_after_embedding": Recipe(1e-2),
    "prompt_ensemble": Recipe(
        1e-2,
        {"prompts": 3, "length": 10},
        without=("logits",),
        beside="the mean over three prompts is of embeddings",
    ),
    "p_tuning": Recipe(
        1e-3, peft=("PromptEncoderConfig", {"num_virtual_tokens": 20, "encoder_hidden_size": 128})
    ),
}

CONVOLUTIONS = [
    "adalora_conv",
    "dora_conv",
    "loha_conv",
    "lokr_conv",
    "lokr_full_conv",
    "lora_conv",
]

ELSEWHERE = {
    "lora_all": "without experts it is lora_all_linear",
    "lora_experts": "MiniLM has no experts",
    **dict.fromkeys(CONVOLUTIONS, "MiniLM has no convolutions"),
    "lora": "it is lora_qv with its default roles",
    "lokr_full": "it is lokr where the rank is half of the second matrix or more",
    "nf4": "it trains nothing by itself: see qlora",
}
"""Shipped rules that the table has no row for."""
