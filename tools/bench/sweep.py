"""Capture every architecture of transformers, small and with random weights, against the original.

python tools/bench/sweep.py --seconds 60 --minutes 30     every model type
python tools/bench/sweep.py bert llama t5                 some of them

Each is captured in a process of its own and compared at a shape it was not captured with. It is
exact, or refused with a code, or has no small config that this script can guess (unfit), or wrong.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import time
from collections import Counter
from multiprocessing.connection import Connection
from typing import Any

# Names that configs give to their sizes, and small values that go together.
SMALL: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "n_inner", "hidden_dim"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "qk_head_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "word_embed_proj_dim": 32,
    "vocab_size": 99,
    "sliding_window": 4,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def small_model(kind: str) -> Any:
    """A small model of that type in eval mode."""
    import torch
    from transformers import AutoModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[kind]
    default = config_class()
    sizes = {k: v for k, v in SMALL.items() if isinstance(getattr(default, k, None), int)}
    special = {k: v for k, v in SPECIAL.items() if getattr(default, k, None) is not None}
    torch.manual_seed(0)
    return AutoModel.from_config(config_class(**sizes, **special)).eval()


def unseen_inputs(model: Any) -> dict[str, Any]:
    """Inputs larger than the examples a capture makes for itself."""
    import torch

    from peftsurgery.capture.inputs import example_inputs

    larger = {name: torch.cat([value, value[:1]]) for name, value in example_inputs(model).items()}
    if model.main_input_name == "input_ids":
        larger = {name: torch.cat([v, v[:, :3]], dim=1) for name, v in larger.items()}
    return larger


def compare(model: Any, answer: Connection) -> str:
    """Capture and compare: "exact", or what differs. Sends a word when the original has run."""
    import torch

    from peftsurgery.capture import capture

    inputs = unseen_inputs(model)
    model.config.use_cache = False
    with torch.no_grad():
        expected = model(**inputs)
        answer.send("it runs")
        actual = capture(model)(**inputs)
    # What a model remembers for the next call (caches, mems) is not captured unless asked for.
    pairs = [(expected[key], b) for key, b in actual.items() if isinstance(b, torch.Tensor)]
    wrong = [(a.float() - b.float()).abs().max().item() for a, b in pairs if not torch.equal(a, b)]
    return f"wrong by {max(wrong):.1e}" if wrong else "exact"


def attempt(kind: str, answer: Connection) -> None:
    """Send what became of one model type; nothing at all if its original fails."""
    from peftsurgery.errors import SurgeryError

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    model = small_model(kind)
    try:
        answer.send(compare(model, answer))
    except SurgeryError as error:
        answer.send(f"refused: {error}")


def bounded(kind: str, seconds: float) -> str:
    """What became of one model type within a time."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=attempt, args=(kind, sender))
    process.start()
    sender.close()
    result = "unfit: no small config, or the original fails"
    end = time.monotonic() + seconds
    try:
        while receiver.poll(max(0, end - time.monotonic())):
            result = str(receiver.recv())
            if result != "it runs":
                return result
            result = "crashed: an error without a code"
        return "slow: it took too long"
    except EOFError:
        return result
    finally:
        process.kill()
        process.join()


def main() -> None:
    """Print a line for each model type, and the counts."""
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--seconds", type=float, default=60, help="for one model")
    parser.add_argument("--minutes", type=float, default=30, help="for all of them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    importlib.import_module("peftsurgery.capture")  # once, for all the forks
    end = time.monotonic() + 60 * options.minutes
    kinds = options.kinds or [kind for kind in CONFIG_MAPPING if kind in MODEL_MAPPING_NAMES]
    counts: Counter[str] = Counter()
    for kind in kinds:
        if time.monotonic() > end:
            break
        result = bounded(kind, options.seconds)
        counts[result.split(":")[0].split(" ")[0]] += 1
        print(f"{kind:28} {result.splitlines()[0][:160]}", flush=True)
    print(dict(counts), f"of {len(kinds)}")


if __name__ == "__main__":
    main()
