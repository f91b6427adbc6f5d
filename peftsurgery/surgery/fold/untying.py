"""A tie that is broken stays broken when the module is saved and loaded again.

One flag of the config, ``tie_word_embeddings``, unties every group of weights at once, so the
weights that are still alike need storage of their own too: ``save_pretrained`` writes one of those
that share it, and nothing would tie the others to it again. Some configs set the flag again when
they are read, and some models compute differently without it. There the flag stays, and
transformers, which ties only what is missing or equal, keeps apart what is written apart.

What counts is what ``from_pretrained`` makes of the result, so that is asked.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from transformers import PreTrainedModel

from peftsurgery.capture.tensors import named_tensors, owner_of
from peftsurgery.capture.tie_flags import FLAG, reread, untied_flags, with_parts
from peftsurgery.errors import SurgeryError, first_line
from peftsurgery.quiet import quiet


def untie(plain: PreTrainedModel, tied: Collection[str]) -> None:
    """Untie every shared tensor of a module, in place, and record it in the config if it can.

    ``tied`` names what was tied before, on both sides. PSG404 if loading it ties different weights.
    """
    _separate(plain)
    _say_untied(plain)
    _check_reload(plain, tied)


def _separate(plain: nn.Module) -> None:
    """Copy what has several names; a module that has several keeps its one tensor."""
    slots: dict[int, tuple[nn.Module, str]] = {}
    for name, tensor in named_tensors(plain):
        slot = owner_of(plain, name)
        if slots.setdefault(id(tensor), slot) == slot:
            continue
        copy = tensor.detach().clone()
        is_parameter = isinstance(tensor, nn.Parameter)
        setattr(*slot, nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy)


def _say_untied(plain: PreTrainedModel) -> None:
    """Clear the flag in all configs of the model, unless they set it again or it means more."""
    if untied_flags(plain) is None:
        return
    for part in plain.modules():
        for _, config in with_parts(part.config) if isinstance(part, PreTrainedModel) else ():
            if getattr(config, FLAG, False):
                setattr(config, FLAG, False)


def _check_reload(plain: PreTrainedModel, tied: Collection[str]) -> None:
    """Load what would be written, which shares the memory, and compare what was tied."""
    state = plain.state_dict()
    try:
        with quiet():
            again = type(plain).from_pretrained(
                None, config=reread(plain.config), state_dict=dict(state), dtype=plain.dtype
            )
    except (RuntimeError, TypeError, ValueError) as error:
        reason = first_line(error)
        raise SurgeryError(
            "PSG404", f"whether a {type(plain).__name__} stays untied cannot be tried: {reason}"
        ) from error
    loaded = again.state_dict()
    for name in tied:
        if name in state and not _is_same(state[name], loaded.get(name)):
            raise SurgeryError(
                "PSG404",
                f"'{name}' is tied to a weight that was adapted differently, and "
                f"{type(plain).__name__} ties them again whenever it is loaded",
                "adapt both sides alike or neither",
            )


def _is_same(written: torch.Tensor, loaded: torch.Tensor | None) -> bool:
    return loaded is not None and torch.equal(written.to(loaded), loaded)
