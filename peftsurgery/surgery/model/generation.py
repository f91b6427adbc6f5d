"""Generation with rewritten inputs: which arguments are inputs, and how lengths count.

The adapters' part is done once, before anything is generated; transformers goes on from what they
made of the inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from peftsurgery.anatomy.model_arguments import ARGUMENTS, TOKENS
from peftsurgery.errors import SurgeryError
from peftsurgery.surgery.model.choices import Rows
from peftsurgery.surgery.plan.cut import Cut

_PROMPTS = ("inputs", *TOKENS, *TOKENS.values())


def check_prompts(rows: Rows, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse adapters that are named for more or fewer prompts than ``generate`` gets. PSG314."""
    given = (*args[:1], *map(kwargs.get, _PROMPTS))
    prompts = next((value for value in given if value is not None), None)
    if prompts is not None:
        replace(rows, repeated=False).times(len(prompts))


def check_outputs(cuts: Iterable[Cut]) -> None:
    """Refuse adapters that change what the model gives, token by token. PSG353."""
    for cut in cuts:
        if not cut.rule.rewrite.keys().isdisjoint(cut.rule.kind.outputs):
            raise SurgeryError(
                "PSG353",
                f"{cut.operation.name} combines what the model says, which generation asks for "
                "token by token",
                "generate with one of its prompts, under prompt_tuning",
            )


def split_inputs(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], config: Any
) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Tensor]]:
    """Split the arguments of ``generate`` into settings and model inputs, with a mask.

    ``config`` is the model's generation config. Lengths that count the text in become numbers of
    new tokens: what rules add to the inputs is not counted.
    """
    settings = dict(kwargs)
    if args:
        settings["inputs"], args = args[0], (None, *args[1:])
    inputs = settings.pop("inputs", None)
    if inputs is not None:
        settings["input_ids"] = inputs
    config = settings.get("generation_config") or config
    names = {*TOKENS, *ARGUMENTS.values()} - {"labels"}
    given = {name: settings.pop(name) for name in names if settings.get(name) is not None}
    if "attention_mask" not in given:
        given["attention_mask"] = _mask(given, settings, config)
    if "input_ids" in given:
        settings |= _new_tokens(settings, config, given["input_ids"].shape[1])
    return args, settings, given


def _new_tokens(settings: dict[str, Any], config: Any, text: int) -> dict[str, int]:
    """Lengths with a text of so many tokens, which leave ``settings``, as lengths without it."""
    counted = {}
    for name, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        length = settings.pop(name, None) or getattr(config, name, None)
        if length and not (settings.get(new) or getattr(config, new, None)):
            counted[new] = max(length - text, 0)
    return counted


def _mask(given: Mapping[str, Tensor], settings: Mapping[str, Any], config: Any) -> Tensor:
    """Attention mask for inputs given without one, from the padding token."""
    tokens = given.get("input_ids")
    if tokens is None:
        return torch.ones_like(given["inputs_embeds"][..., 0], dtype=torch.long)
    pad = settings.get("pad_token_id", config.pad_token_id)
    ends = settings.get("eos_token_id", config.eos_token_id)
    if pad is None or pad in (ends if isinstance(ends, list | tuple) else [ends]):
        return torch.ones_like(tokens)
    mask = (tokens != pad).long()
    return mask if bool(mask.any()) else torch.ones_like(tokens)
