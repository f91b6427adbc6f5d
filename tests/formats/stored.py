"""Small models and peft adapters for them, as directories."""

from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

ALPHA, RANK = 6.0, 3
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "vocab_size": 64}
ODD: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


def base_at(folder: Path, kind: str, dtype: torch.dtype, shard: str, **more: Any) -> Path:
    """A small model's directory, with some files that no library knows."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **ODD, **more})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "notes.txt").write_text("kept")
    (folder / "extra").mkdir()
    (folder / "extra" / "table.csv").write_text("a,b")
    (folder / "pytorch_model.bin").write_bytes(b"another copy of the base's weights")
    return folder


def adapter_at(folder: Path, base: Path, **config: Any) -> Path:
    """A peft adapter of random values for a base."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    torch.manual_seed(1)
    given = {"r": RANK, "lora_alpha": ALPHA, "init_lora_weights": False, **config}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**given), autocast_adapter_dtype=True)
    for name, value in wrapped.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            value.data.mul_(0.1).add_(0.01)
    wrapped.save_pretrained(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def content(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
