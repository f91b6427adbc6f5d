"""A text encoder's adapter that diffusers saves, and the outputs with it.

``diffusers_writer.py BASE ADAPTER_DIR IDS.npy OUT.npy``, in an environment with diffusers and peft.
"""

import sys

import numpy as np
import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader
from peft import LoraConfig, get_peft_model_state_dict
from transformers import CLIPTextModel

base, adapter, ids, out = sys.argv[1:]
torch.manual_seed(0)
encoder = CLIPTextModel.from_pretrained(base).eval()
config = LoraConfig(
    r=4, lora_alpha=6, target_modules=["q_proj", "fc1"], rank_pattern={"fc1": 2}, use_rslora=True
)
encoder.add_adapter(config)
with torch.no_grad():
    for name, parameter in encoder.named_parameters():
        if "lora_" in name:
            parameter.copy_(0.2 * torch.randn_like(parameter))
Loader.save_lora_weights(
    adapter,
    text_encoder_lora_layers=get_peft_model_state_dict(encoder),
    text_encoder_lora_adapter_metadata=encoder.peft_config["default"].to_dict(),
)
with torch.no_grad():
    np.save(out, encoder(torch.from_numpy(np.load(ids))).last_hidden_state.numpy())
