"""Run a model directory with transformers alone: what somebody does who was sent the folded model.

``python plain.py MODEL INPUTS.safetensors OUTPUTS.safetensors`` runs the base model on the inputs;
with ``--generate N`` the causal language model continues them by N tokens, greedily.
"""

import argparse
import sys
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import logging


def main() -> None:
    """Load, run, save; and make sure that nothing of peftsurgery was needed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("inputs")
    parser.add_argument("outputs")
    parser.add_argument("--generate", type=int, default=0, metavar="N")
    options = parser.parse_args()
    logging.disable_progress_bar()
    inputs = load_file(options.inputs)
    loader: Any = AutoModelForCausalLM if options.generate else AutoModel
    model = loader.from_pretrained(options.model, dtype=torch.float32).eval()
    with torch.no_grad():
        if options.generate:
            result = model.generate(**inputs, max_new_tokens=options.generate, do_sample=False)
            outputs = {"tokens": result, "logits": model(**inputs).logits}
        else:
            outputs = {"last_hidden_state": model(**inputs).last_hidden_state}
    save_file({name: value.contiguous() for name, value in outputs.items()}, options.outputs)
    assert not any(name.partition(".")[0] == "peftsurgery" for name in sys.modules)


main()
