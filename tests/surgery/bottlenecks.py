"""Bottleneck adapters done to the original model by forward hooks: an oracle without graphs.

Where a sublayer's output h joins the stream x is written down here by the names of transformers'
modules, for each architecture; dropout is off.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftsurgery.surgery.model.operated import OperatedModel

MODELS = ("bert_mlm", "gpt2", "llama", "gpt_neox", "qwen2_moe", "t5", "bart")


@dataclass(frozen=True)
class Place:
    """A sublayer of a block: what it is, the module that gives h, and the module that is given x.

    ``argument`` says which of that module's arguments x is; ``norm`` normalises the sum, if
    anything does.
    """

    after: str
    h: str
    x: str
    argument: int | str = 0
    norm: str | None = None


BERT = (
    Place("self", "attention.output.dense", "attention.output", 1, "attention.output.LayerNorm"),
    Place("ffn", "output.dense", "output", 1, "output.LayerNorm"),
)
GPT2 = (Place("self", "attn.c_proj", "ln_1"), Place("ffn", "mlp.c_proj", "ln_2"))
LLAMA = (
    Place("self", "self_attn.o_proj", "input_layernorm"),
    Place("ffn", "mlp.down_proj", "post_attention_layernorm"),
)
NEOX = (
    Place("self", "attention.dense", "input_layernorm"),
    Place("ffn", "mlp.dense_4h_to_h", "post_attention_layernorm"),
)
EXPERTS = (LLAMA[0], Place("ffn", "mlp", "post_attention_layernorm"))  # and a shared expert
T5_SELF = Place("self", "layer.0.SelfAttention.o", "layer.0.layer_norm")
T5_CROSS = Place("cross", "layer.1.EncDecAttention.o", "layer.1.layer_norm")
BART_SELF = Place(
    "self", "self_attn.out_proj", "self_attn", "hidden_states", "self_attn_layer_norm"
)
BART_CROSS = Place(
    "cross", "encoder_attn.out_proj", "encoder_attn", "hidden_states", "encoder_attn_layer_norm"
)
BART_FFN = Place("ffn", "fc2", "fc1", 0, "final_layer_norm")


def _t5_ffn(number: int) -> Place:
    return Place("ffn", f"layer.{number}.DenseReluDense.wo", f"layer.{number}.layer_norm")


LISTS: dict[str, dict[str, tuple[Place, ...]]] = {
    "bert_mlm": {"bert.encoder.layer": BERT},
    "gpt2": {"transformer.h": GPT2},
    "llama": {"model.layers": LLAMA},
    "qwen2_moe": {"model.layers": EXPERTS},
    "gpt_neox": {"gpt_neox.layers": NEOX},
    "t5": {
        "encoder.block": (T5_SELF, _t5_ffn(1)),
        "decoder.block": (T5_SELF, T5_CROSS, _t5_ffn(2)),
    },
    "bart": {
        "model.encoder.layers": (BART_SELF, BART_FFN),
        "model.decoder.layers": (BART_SELF, BART_CROSS, BART_FFN),
    },
}

Norm = Callable[[Tensor], Tensor]
NewH = Callable[[str, Tensor, Tensor, Norm], Tensor]


def places(name: str, module: nn.Module, after: Collection[str]) -> Iterator[tuple[str, Place]]:
    """The places of a model after those sublayers, each with the path of its block."""
    for path, kinds in LISTS[name].items():
        for number in range(len(module.get_submodule(path))):
            yield from ((f"{path}.{number}", place) for place in kinds if place.after in after)


@contextmanager
def rewritten(
    name: str, module: nn.Module, after: Collection[str], new: NewH
) -> Iterator[nn.Module]:
    """The original where every h is ``new(path of the linear that ends it, h, x, norm)``."""
    handles = []
    for block, place in places(name, module, after):
        handles += _hook(module.get_submodule(block), f"{block}.{place.h}", place, new)
    try:
        yield module
    finally:
        for handle in handles:
            handle.remove()


def _hook(block: nn.Module, path: str, place: Place, new: NewH) -> list[Any]:
    seen: list[Tensor] = []
    norm: Norm = nn.Identity() if place.norm is None else block.get_submodule(place.norm)

    def watch(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = isinstance(place.argument, str) and place.argument in kwargs
        number = place.argument if isinstance(place.argument, int) else 0
        seen[:] = [kwargs[place.argument] if named else args[number]]

    def change(part: nn.Module, args: tuple[Any, ...], h: Tensor) -> Tensor:
        return new(path, h, seen[0], norm)

    watched = block.get_submodule(place.x).register_forward_pre_hook(watch, with_kwargs=True)
    return [watched, block.get_submodule(place.h).register_forward_hook(change)]


def leaves(model: OperatedModel) -> dict[str, Tensor]:
    """Copies of what a model learnt, for the oracle to have gradients of its own."""
    return {n: p.detach().clone().requires_grad_() for n, p in model.learnt().items()}


def under(values: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """The values whose names begin with ``path``, by their last name: D, bd, U, bu."""
    return {n.rpartition(".")[2]: v for n, v in values.items() if n.startswith(f"{path}.")}


def readout(output: Any) -> Tensor:
    """A number that every logit has a share in, each another one."""
    logits: Tensor = output[0]
    weights = torch.linspace(-1.0, 1.0, logits.shape[-1])
    return (logits * weights).mean()
