"""Outputs of a text encoder with an adapter that diffusers loads.

``kohya_reader.py BASE ADAPTER_DIR IDS.npy OUT.npy``, in an environment with diffusers and peft.
"""

import sys

import numpy as np
import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader
from transformers import CLIPTextModel

base, adapter, ids, out = sys.argv[1:]
encoder = CLIPTextModel.from_pretrained(base).eval()
state, alphas = Loader.lora_state_dict(adapter)
prefix = Loader.text_encoder_name
Loader.load_lora_into_text_encoder(state, alphas, encoder, prefix=prefix, adapter_name="mine")
with torch.no_grad():
    np.save(out, encoder(torch.from_numpy(np.load(ids))).last_hidden_state.numpy())
