"""Small LoRA adapters of peft's own, in directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}


def llama(**changes: Any) -> LlamaForCausalLM:
    """A Llama of two layers, the same every time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval()


def saved_lora(folder: Path, seed: int = 1, base: nn.Module | None = None, **config: Any) -> Path:
    """An adapter of peft's with random numbers, saved to ``folder``."""
    given = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], **config}
    model = get_peft_model(llama() if base is None else base, LoraConfig(**given))
    model.peft_config["default"].base_model_name_or_path = "some/base"
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter + 0.1 * noise if "magnitude" in name else noise)
    model.save_pretrained(str(folder))
    return folder


def changes(folder: Path, base: nn.Module | None = None) -> dict[str, torch.Tensor]:
    """What peft adds to each weight by an adapter, by the weight's name."""
    plain = llama() if base is None else base
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    merged = PeftModel.from_pretrained(plain, str(folder)).merge_and_unload()
    after = merged.state_dict()
    moved = {name: after[name] - value for name, value in before.items() if name in after}
    return {name: value for name, value in moved.items() if value.any()}
