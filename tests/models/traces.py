"""A model exported with each block traced, and with equal ones filled in: the two compared."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from transformers import DynamicCache

from peftsurgery.capture.export import Exported, export
from peftsurgery.capture.generating import cache_argument
from peftsurgery.capture.module_calls import GIVEN, RETURNED, ModuleCalls, noted_calls
from peftsurgery.capture.signature import bind_call, widen
from peftsurgery.capture.threads import making, traced_alone
from tests.models import changing_blocks
from tests.models.zoo import Inputs, entry, ids

STAGES = ("stage_names", "out_features", "out_indices", "num_layers", "num_hidden_layers")
PER_LAYER = ("layer_types", "attention_layers")
ASSERTION = torch.ops.aten._assert_scalar.default
LENGTHS = (
    *("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers"),
    "num_decoder_layers",
)


@dataclass(frozen=True)
class Traced:
    """What came of an export, and the calls of modules that were noted."""

    exported: Exported
    calls: ModuleCalls

    def described(self) -> list[Any]:
        """Every node by what it does and where it comes from; names are left out."""
        graph = self.exported.module.graph
        number = {node: f"%{index}" for index, node in enumerate(graph.nodes)}
        return [
            (
                *(node.op, str(node.target), repr(_arguments(node, number))),
                *(_kinds(node.meta.get("val")), repr(node.meta.get("nn_module_stack"))),
                *(sorted(node.meta.get(key, ())) for key in (GIVEN, RETURNED)),
            )
            for node in graph.nodes
        ]


def _arguments(node: fx.Node, number: dict[fx.Node, str]) -> Any:
    args = node.args[:1] if node.target is ASSERTION else node.args  # its message names a node
    return fx.map_arg((args, dict(node.kwargs)), lambda source: number[source])


def _kinds(value: Any) -> list[Any]:
    return [
        (str(tuple(leaf.shape)), str(leaf.stride()), leaf.dtype, leaf.device)
        if isinstance(leaf, Tensor)
        else str(leaf)
        for leaf in pytree.tree_leaves(value)
    ]


def traced(module: nn.Module, inputs: Inputs, once: bool) -> Traced:
    """The module exported for these inputs, each block traced or equal ones filled in."""
    changing_blocks.restart()
    module = copy.deepcopy(module)
    call = widen(bind_call(module, (), inputs))
    with making(), traced_alone(), noted_calls(module) as notes:
        exported = export(module, call, module.training, notes, once)
    return Traced(exported, notes.done())


def compared(module: nn.Module, inputs: Inputs) -> tuple[str, ...]:
    """The blocks that were filled in, once what came of it was seen to be the plain trace."""
    plain, filled = traced(module, inputs, once=False), traced(module, inputs, once=True)
    assert plain.described() == filled.described()
    assert plain.calls == filled.calls
    assert plain.exported.conditions == filled.exported.conditions
    assert plain.exported.mode == filled.exported.mode
    assert plain.exported.output == filled.exported.output
    assert not plain.exported.filled
    return filled.exported.filled


def cached(module: Any, past: int) -> Inputs:
    """A call beside a cache that holds so many tokens: of the first of a text, or of one more."""
    cache, new = DynamicCache(config=module.config), 1 if past else 6
    beside: Any = {str(cache_argument(module)): cache, "use_cache": True}
    if past:
        with torch.no_grad():
            module(input_ids=ids(2, past), **beside)
    mask = torch.ones(2, past + new, dtype=torch.long)
    return {"input_ids": ids(2, new), "attention_mask": mask, **beside}


def deeper(name: str, layers: int) -> nn.Module:
    """A model of the zoo with so many layers in each of its lists."""
    module: Any = entry(name).build()
    if not hasattr(module, "config"):
        return module
    known = module.config.to_diff_dict()
    fixed = ("architectures", "transformers_version", "dtype", "model_type", *PER_LAYER)
    settings = {key: value for key, value in known.items() if key not in fixed}
    lengths = {key: layers for key in LENGTHS if key in module.config.to_dict()}
    if "depths" in settings:
        settings["depths"], lengths = [layers] * len(settings["depths"]), {}
        settings = {key: value for key, value in settings.items() if key not in STAGES}
    if "attention_types" in settings:
        kinds = settings["attention_types"][0][0]
        settings["attention_types"] = [[kinds, layers]]
        lengths = {key: layers * len(kinds) for key in lengths}
    torch.manual_seed(0)
    made: nn.Module = type(module)(type(module.config)(**settings | lengths))
    return made
