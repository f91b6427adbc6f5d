"""Prefixes in peft's files: one tensor for all layers, and no wrappers around modules.

    prompt_embeddings (length, 2 layers kv_heads head_dim)
        for each virtual token: keys of the first layer, its values, keys of the second, ...

peft hands a prefix to the model as what it remembers of the text before. So it is at every core of
self-attention, and the text's positions come after it. Of an encoder-decoder only the decoder has
one, and its layer i has number 2 i mod layers: peft (0.21.2) repeats the tensor for the cross
attention, cuts it in fours, and then clears what would be the cross attention's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from peftsurgery.capture import GraphModel
from peftsurgery.errors import SurgeryError
from peftsurgery.formats.peft.config import FORMAT, AdapterConfig
from peftsurgery.formats.peft.files import BASE
from peftsurgery.formats.peft.prompts import task_of
from peftsurgery.formats.peft.tensor_keys import without_wrapper
from peftsurgery.formats.peft.trained_modules import say_trained
from peftsurgery.language import RuleFile, resolve_settings, shape_of
from peftsurgery.surgery.model.operated import OperatedModel
from peftsurgery.surgery.plan.cut import Cut, Operation
from peftsurgery.surgery.plan.select import select_cuts

KIND, PAIRED = "attention", "num_transformer_submodules"
LENGTH = "num_virtual_tokens"


def is_prefix(cuts: Sequence[Cut]) -> bool:
    """Whether an adapter's parameters are one tensor of all its attention cores in peft."""
    added = [cut for cut in cuts if cut.rule.params]
    return bool(added) and all(
        cut.rule.kind.name == KIND and cut.rule.suffixes(FORMAT) for cut in added
    )


def is_pair(model: GraphModel) -> bool:
    """Whether a model is an encoder-decoder."""
    config = getattr(model.source.module, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False))


def prefixed(model: GraphModel, file: RuleFile, settings: dict[str, Any], name: str) -> Operation:
    """The operation that peft's prefix is on a model, under an adapter's name."""
    settings = {**settings, **file.implied(FORMAT)}
    if is_pair(model):
        settings["causal"] = True
    operation = Operation(file, resolve_settings(file, settings), name)
    if not is_pair(model):
        return operation
    settings["slots"] = len(prefixes(model, operation))
    return Operation(file, resolve_settings(file, settings), name)


def prefixes(model: GraphModel, operation: Operation) -> list[Cut]:
    """The cuts of an operation that have parameters, in the model's order."""
    return [cut for cut in select_cuts(model.base_capture, operation)[0] if cut.rule.params]


def numbers(model: GraphModel, count: int) -> list[int]:
    """The number of each layer's prefix in peft's tensor."""
    return [2 * layer % count if is_pair(model) else layer for layer in range(count)]


def shape_in_file(cuts: Sequence[Cut]) -> tuple[int, int]:
    """The shape of peft's tensor. PSG507 if not all cores have heads alike."""
    kinds = {(c.sizes["kv_heads"], c.sizes["head_dim"]) for c in cuts}
    if len(kinds) != 1:
        raise SurgeryError("PSG507", "the model's layers have no heads alike, as a prefix needs")
    heads, width = next(iter(kinds))
    rule, suffixes = cuts[0].rule, cuts[0].rule.suffixes(FORMAT)
    length, *_ = shape_of(rule.params[next(iter(suffixes))], rule, cuts[0].numbers)
    return length, 2 * len(cuts) * heads * width


def check_config(config: AdapterConfig, model: GraphModel, cuts: Sequence[Cut]) -> None:
    """Refuse a config that was made for a model of another kind. PSG508."""
    wanted = {
        PAIRED: 2 if is_pair(model) else 1,
        "num_layers": len(cuts),
        "num_attention_heads": cuts[0].sizes["kv_heads"],
    }
    for key, ours in wanted.items():
        theirs = config.value(key)
        if config.values.get(key) is not None and theirs != ours:
            message = f"the adapter's {key} is {theirs!r}, and this model's is {ours}"
            raise SurgeryError("PSG508", message, "the adapter was made for another base")


def split(model: GraphModel, cuts: Sequence[Cut], tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parameters in peft's tensor, by their names here."""
    shape = (cuts[0].sizes["kv_heads"], cuts[0].sizes["head_dim"])
    parts = tensor.view(len(tensor), 2 * len(cuts), *shape)
    known = {}
    for cut, number in zip(cuts, numbers(model, len(cuts)), strict=True):
        for place, param in enumerate(cut.rule.suffixes(FORMAT)):
            known[cut.parameters[param]] = parts[:, 2 * number + place].contiguous()
    return known


def export_prefix(
    model: OperatedModel, name: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The config and the tensors of a flat prefix. PSG510 for what peft has no form for."""
    every = [cut for cut in model.cuts if cut.operation.name == name]
    cuts = [cut for cut in every if cut.rule.params]
    file = cuts[0].operation.file
    _check_places(model, name, cuts)
    config: dict[str, Any] = file.identifying(FORMAT) | {
        key: cuts[0].operation.settings[setting] for key, setting in file.carried(FORMAT).items()
    }
    base, heads = model.source.module, cuts[0].sizes["kv_heads"]
    said = say_trained(model, {str(c.placed.parameter) for c in every if c.rule.train}, [], False)
    config |= {"task_type": task_of(name, base), PAIRED: 2 if is_pair(model) else 1}
    config |= {"token_dim": heads * cuts[0].sizes["head_dim"], "num_attention_heads": heads}
    config |= {"num_layers": len(cuts), "prefix_projection": False}
    config |= {"modules_to_save": said.modules or None, "inference_mode": True}
    config[BASE] = model.source.origin
    suffix = next(iter(cuts[0].rule.suffixes(FORMAT).values()))
    own = {without_wrapper(key): value for key, value in said.tensors.items()}
    return config, {suffix: _joined(model, name, cuts), **own}


def _check_places(model: OperatedModel, name: str, cuts: Sequence[Cut]) -> None:
    """Refuse a prefix that is not just where peft would put it, or positions that do not move."""
    operation = cuts[0].operation
    for setting, value in operation.file.implied(FORMAT).items():
        if operation.settings[setting] != value:
            raise SurgeryError(
                "PSG510",
                f"'{name}' has {setting} = {operation.settings[setting]!r}, and peft's prefixes "
                f"are as with {setting} = {value!r}",
                "save the surgery itself with save()",
            )
    carried = operation.file.carried(FORMAT).values()
    own = {setting: operation.settings[setting] for setting in carried}
    theirs = prefixes(model, prefixed(model, operation.file, own, name))
    ours = [cut.placed.module for cut in cuts]
    if [cut.placed.module for cut in theirs] != ours:
        raise SurgeryError(
            "PSG510",
            f"'{name}' is a prefix of {len(ours)} cores, and peft's is of {len(theirs)}: all "
            "self-attention of an encoder or a decoder, the decoder's of both",
            "save the surgery itself with save()",
        )


def _joined(model: OperatedModel, name: str, cuts: Sequence[Cut]) -> torch.Tensor:
    """The tensor of all layers. PSG510 if two layers differ that have one prefix in peft."""
    length, width = shape_in_file(cuts)
    shape = (cuts[0].sizes["kv_heads"], cuts[0].sizes["head_dim"])
    whole = torch.zeros(length, 2 * len(cuts), *shape)
    seen: dict[int, Cut] = {}
    for cut, number in zip(cuts, numbers(model, len(cuts)), strict=True):
        params = [cut.parameters[param] for param in cut.rule.suffixes(FORMAT)]
        values = torch.stack([model.get_parameter(full).detach().cpu() for full in params], 1)
        place = whole[:, 2 * number : 2 * number + 2]
        if number in seen and not torch.equal(place, values):
            raise SurgeryError(
                "PSG510",
                f"'{name}' differs at '{seen[number].placed.module}' and '{cut.placed.module}', "
                "which have one prefix in peft",
                f"train it with slots={len(cuts)}, or save the surgery itself with save()",
            )
        seen[number] = cut
        place.copy_(values)
    return whole.view(length, width)
