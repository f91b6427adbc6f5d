"""An adapter of mlx-lm's own, and its logits: ``mlx_writer.py BASE ADAPTER IDS.npy OUT.npy``.

It runs in an environment of its own, with mlx, mlx-cpu and mlx-lm, and writes as the trainer does.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

base, adapter, ids, out = sys.argv[1:]
mx.set_default_device(mx.cpu)
mx.random.seed(0)
model, _ = load_model(Path(base))
model.freeze()
settings = {"rank": 5, "scale": 1.5, "dropout": 0.0, "keys": ["self_attn.o_proj", "mlp.down_proj"]}
linear_to_lora_layers(model, 2, settings)
model.update(tree_map(lambda v: 0.2 * mx.random.normal(v.shape), model.trainable_parameters()))
model.eval()
folder = Path(adapter)
folder.mkdir()
said = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": settings}
(folder / "adapter_config.json").write_text(json.dumps(said))
tensors = dict(tree_flatten(model.trainable_parameters()))
mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
np.save(out, np.array(model(mx.array(np.load(ids))).astype(mx.float32)))
