"""A text encoder's adapter that LyCORIS saves, and the outputs with it.

``lycoris_writer.py BASE ADAPTER_DIR IDS.npy OUT.npy METHOD``, in an environment with lycoris.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import save_file
from transformers import CLIPTextModel

METHODS = {
    "locon": (LoConModule, {}),
    "dora": (LoConModule, {"weight_decompose": True, "wd_on_out": True}),
    "loha": (LohaModule, {"rs_lora": True}),
    "lokr": (LokrModule, {"use_scalar": True, "decompose_both": True}),
    "lokr, whole": (LokrModule, {"full_matrix": True}),
}

base, adapter, ids, out, method = sys.argv[1:]
torch.manual_seed(0)
encoder = CLIPTextModel.from_pretrained(base).eval()
module, settings = METHODS[method]
tensors = {}
linears = {n: m for n, m in encoder.named_modules() if isinstance(m, torch.nn.Linear)}
for path, linear in linears.items():
    name = "lora_te_text_model_" + path.removeprefix("text_model.").replace(".", "_")
    layer = module(name, linear, 1.0, lora_dim=2, alpha=1.0, **settings)
    with torch.no_grad():
        for key, parameter in layer.named_parameters():
            if key == "dora_scale":
                parameter.mul_(1.2)
            elif "org_" not in key:
                parameter.copy_(0.4 * torch.randn_like(parameter))
    for part, value in layer.custom_state_dict().items():
        tensors[f"{name}.{part}"] = value.detach().clone().contiguous()
    layer.apply_to()
Path(adapter).mkdir()
save_file(tensors, Path(adapter, "lora.safetensors"))
with torch.no_grad():
    np.save(out, encoder(torch.from_numpy(np.load(ids))).last_hidden_state.numpy())
