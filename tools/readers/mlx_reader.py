"""Logits of mlx-lm for a model with an adapter: ``mlx_reader.py BASE ADAPTER IDS.npy OUT.npy``.

It runs in an environment of its own, with mlx, mlx-cpu and mlx-lm.
"""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

base, adapter, ids, out = sys.argv[1:]
mx.set_default_device(mx.cpu)
model, _ = load_model(Path(base))
model = load_adapters(model, adapter)
model.eval()
np.save(out, np.array(model(mx.array(np.load(ids))).astype(mx.float32)))
