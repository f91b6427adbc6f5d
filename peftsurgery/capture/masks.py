"""Masks of transformers in a trace: made as they are when a model runs, or decided by value.

A model that runs leaves out a mask that masks nothing, and lets its attention cores be causal or
not by themselves; a trace always makes the mask. Mostly that is one and the same. It is not where a
causal mask goes to a core that is not causal by itself (or the other way round): then the answer
that the call's own mask gives is taken, and becomes a condition of the capture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import masking_utils
from transformers.exporters.utils import patch_attribute
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peftsurgery.capture.signature import Call
from peftsurgery.capture.sizes import keeps_all
from peftsurgery.errors import SurgeryError

CORE = "sdpa"  # the only kind of attention whose masks are left out


@dataclass
class Masks:
    """The masks of one trace of a call.

    ``by_value`` is whether they are left out where the model leaves them out; otherwise they are
    all made, and ``matters`` says afterwards whether that makes a difference.
    """

    call: Call
    by_value: bool = False
    matters: bool = False
    conditions: list[str] = field(default_factory=list)
    _skippable: bool | None = None
    _packed: bool = False
    _causal: dict[int, tuple[Tensor, bool]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._answers = {  # now, since in a trace there are no values
            name: keeps_all(value)
            for name, value in self.call.tensors.items()
            if name.endswith("attention_mask") and isinstance(value, Tensor) and value.ndim == 2
        }

    @contextmanager
    def traced(self) -> Iterator[None]:
        """What a trace of the call needs."""
        with ExitStack() as stack:
            enter = stack.enter_context
            enter(patch_attribute(masking_utils, "_vmap_expansion_sdpa", _broadcast))
            enter(patch_attribute(masking_utils, "TransformGetItemToIndex", lambda _: nullcontext))
            for name, causal in (
                ("_ignore_causal_mask_sdpa", True),
                ("_ignore_bidirectional_mask_sdpa", False),
            ):
                enter(patch_attribute(masking_utils, name, self._deciding(causal)))
            enter(patch_attribute(masking_utils, "find_packed_sequence_indices", self._packing))
            enter(_replaced(ALL_MASK_ATTENTION_FUNCTIONS, self._noting))
            enter(_replaced(ALL_ATTENTION_FUNCTIONS, self._watching))
            yield

    def known(self, tensor: Tensor) -> bool | None:
        """Whether a tensor is a mask that would be left out if it masked nothing, and a causal one.

        Attention asks that of the masks that it is given.
        """
        mask = self._causal.get(_memory(tensor))
        return None if mask is None else mask[1]

    @property
    def made(self) -> tuple[Any, ...]:
        """What has been made and decided up to now."""
        return len(self._causal), len(self.conditions), self._skippable, self._packed

    def _deciding(self, causal: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """What decides whether a mask is left out, in place of a function of transformers."""

        def patch(original: Callable[..., Any]) -> Callable[..., Any]:
            def decide(padding: Tensor | None, *sizes: Any, **named: Any) -> bool:
                if any(isinstance(size, Tensor) for size in (*sizes, *named.values())):
                    return False  # as the model decides in a trace: there is no value to look at
                with (
                    patch_attribute(masking_utils, "is_torchdynamo_exporting", _never),
                    patch_attribute(masking_utils, "is_tracing", _never),
                ):
                    skippable = bool(original(None, *sizes, **named))
                if not skippable:
                    return False
                if self.call.trace is not None:
                    return padding is None  # a mask beside a cache is given if it masks something
                if not self.by_value:
                    self._skippable = causal
                    return False
                return padding is None or self._masks_nothing()

            return decide

        return patch

    def _packing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Which tokens belong together, by their positions: all, if the call gives no positions."""

        def find(positions: Tensor) -> Tensor | None:
            if not self.by_value:
                self._packed = True
                found: Tensor | None = original(positions)
                return found
            if "position_ids" in self.call.tensors:
                message = "whether a mask is left out depends on the values of 'position_ids'"
                raise SurgeryError("PSG201", message, "give a mask beside them")
            return None

        return find

    def _masks_nothing(self) -> bool:
        """Whether the call's masks of tokens keep all of them, which becomes a condition."""
        answers = self._answers
        if len(set(answers.values())) != 1:
            raise SurgeryError(
                "PSG201",
                "a mask that is left out if it masks nothing is none of the call's own, or one of "
                f"several: {', '.join(answers) or 'there is none'}",
                "pad all of them, or none",
            )
        for name, answer in answers.items():
            self.conditions.append(f"{'' if answer else 'not '}keeps_all({name})")
        return all(answers.values())

    def _noting(self, made: Callable[..., Any]) -> Callable[..., Any]:
        """Note which masks would be left out if they masked nothing."""

        def make(*args: Any, **named: Any) -> Any:
            self._skippable, self._packed = (True if self._packed else None), False
            mask = made(*args, **named)
            if self._skippable is not None and isinstance(mask, Tensor):
                self._causal[_memory(mask)] = mask, self._skippable
            return mask

        return make

    def _watching(self, core: Callable[..., Any]) -> Callable[..., Any]:
        """Note whether a core that gets such a mask would do something else without it."""

        def attend(module: Any, *args: Any, **named: Any) -> Any:
            mask = named["attention_mask"] if "attention_mask" in named else args[3]
            if isinstance(mask, Tensor) and _memory(mask) in self._causal:
                causal = named.get("is_causal")
                causal = getattr(module, "is_causal", True) if causal is None else causal
                self.matters |= self._causal[_memory(mask)][1] != bool(causal)
            return core(module, *args, **named)

        return attend


@contextmanager
def _replaced(
    functions: Any, by: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    before = functions[CORE]
    own = dict(functions._local_mapping)
    functions[CORE] = by(before)
    try:
        yield
    finally:
        functions._local_mapping.clear()
        functions._local_mapping.update(own)


def _memory(mask: Tensor) -> int:
    """What a mask and its views have in common."""
    return int(mask.untyped_storage()._cdata)


def _never(_: Any) -> Callable[..., bool]:
    return lambda *args: False


def _broadcast(_: Any) -> Callable[..., Any]:
    """Masks made of indices along four axes at once, in place of one axis after the other."""

    def expansion(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(*axes: Tensor) -> Tensor:
            indices = masking_utils._non_vmap_expansion_sdpa(*axes)
            return function(*indices).expand([axis.shape[0] for axis in axes])

        return make

    return expansion
