"""What trainers and other libraries see when they look at a captured model: the original.

They read the signature of ``forward`` to tell which columns of a dataset are inputs and which are
labels, and the class for the task. :mod:`peftsurgery.capture.classes` answers for the class; here
is what a whole model answers in its own way.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.utils import SAFE_WEIGHTS_NAME

from peftsurgery.capture.classes import FILES
from peftsurgery.capture.compiling import Compiling
from peftsurgery.capture.modules import Block, Part
from peftsurgery.capture.sources import Source
from peftsurgery.errors import SurgeryError
from peftsurgery.places import check_apart, give_usual_mode


@lru_cache(maxsize=256)
def forward_like(kind: Any, original: Any) -> Callable[..., Any]:
    """The forward of ``kind`` with the signature that the original's forward has."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return kind.forward(self, *args, **kwargs)

    forward.__doc__ = kind.forward.__doc__
    vars(forward)["__signature__"] = inspect.signature(original.forward)
    return forward


def loaded_from(source: Source) -> str | None:
    """Where a live model of transformers was loaded from, a path or a hub id, as far as it says."""
    name = getattr(source.module, "name_or_path", None)
    return name if isinstance(name, str) and name else None


class Likeness(Part):
    """The original's API (save_pretrained, device, checkpointing...) on a captured model."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        **others: Any,
    ) -> None:
        """Write the state dict as ``model.safetensors``, for ``load_state_dict`` to read.

        This is what trainers call for their checkpoints; of an operated model it is what was
        learnt. A model for ``from_pretrained`` is what ``fold`` makes. A tensor with several names
        is written once. PSG216 for another option, PSG602 where that would lie in, or be, something
        that the model was made of.
        """
        asked = [f"{name}=..." for name, value in others.items() if value]
        if asked:
            message = f"save_pretrained of a captured model has no {', '.join(asked)}"
            raise SurgeryError("PSG216", message, FILES)
        if not is_main_process:
            return
        directory = Path(save_directory)
        check_apart(directory / SAFE_WEIGHTS_NAME, self.read_from())
        state = self.state_dict() if state_dict is None else state_dict
        first = {_memory(tensor): name for name, tensor in reversed(list(state.items()))}
        once = {name: t for name, t in state.items() if first[_memory(t)] == name}
        uses = Counter(tensor.untyped_storage().data_ptr() for tensor in once.values())
        tensors = {
            # a file has no tensors that overlap: each is a copy there
            name: t.clone() if uses[t.untyped_storage().data_ptr()] > 1 else t
            for name, t in once.items()
        }
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, directory / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        give_usual_mode(directory / SAFE_WEIGHTS_NAME)

    @abstractmethod
    def read_from(self) -> Iterator[str | Path | None]:
        """The places of what the model was made of, where nothing is to be written."""

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As any module's; one name is enough for a tensor that has several."""
        own = self.state_dict()
        given = {_memory(own[name]): value for name, value in state_dict.items() if name in own}
        tied = {
            name: given[_memory(tensor)]
            for name, tensor in own.items()
            if name not in state_dict and _memory(tensor) in given
        }
        if not tied:
            return super().load_state_dict(state_dict, strict, assign)
        whole = OrderedDict({**state_dict, **tied})
        vars(whole)["_metadata"] = getattr(state_dict, "_metadata", None)
        return super().load_state_dict(whole, strict, assign)

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: what is one tensor in the original is one here, however it is loaded."""

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first parameter that holds real numbers."""
        floating = (p.dtype for p in self.parameters() if p.is_floating_point())
        return next(floating, torch.get_default_dtype())

    def compile(self, **options: Any) -> None:
        """Compile what the model runs from now on, in calls, in training and in ``generate``.

        ``options`` are torch.compile's (backend, mode, dynamic, ...); ``disable=True`` undoes it.
        Blocks of one shape class are compiled once, when a call first needs them, and the top graph
        calls them as ever: hooks, switched adapters and recomputation work on. PSG223 for options
        that torch.compile does not take, PSG224 in a call if its backend fails, as for want of a
        C++ compiler.
        """
        compiling = None if options.get("disable") else Compiling(options)
        for part in self.modules():
            if isinstance(part, Part):
                part.compiling = compiling

    def gradient_checkpointing(self, enabled: bool = True, every: int = 1) -> None:
        """Recompute each block's forward in the backward pass instead of keeping activations.

        ``every`` leaves all but every so many blocks of a list as they are.
        """
        for path, part in self.named_modules():
            if isinstance(part, Block):
                number = path.rpartition(".")[2]
                part.checkpointing = enabled and int(number if number.isdigit() else 0) % every == 0

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any block is recomputed."""
        return any(isinstance(part, Block) and part.checkpointing for part in self.modules())

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """:meth:`gradient_checkpointing`, as transformers asks for it.

        PSG214 for what is not done: re-entering (which would lose the gradients of a model whose
        inputs need none), and moving activations to another device.
        """
        asked = {k: v for k, v in (activation_checkpointing_kwargs or {}).items() if v}
        if asked or offload:
            what = ", ".join(asked) or "offload"
            hint = "blocks are recomputed without re-entering and stay where they are"
            raise SurgeryError("PSG214", f"gradient checkpointing has no {what}", hint)
        self.gradient_checkpointing(True, every_n_layers)

    def activation_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self.gradient_checkpointing(False)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **others: Any
    ) -> None:
        """:meth:`activation_checkpointing_enable` under its older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **others)

    gradient_checkpointing_disable = activation_checkpointing_disable


def _memory(tensor: torch.Tensor) -> Hashable:
    """Hashable identity of a tensor: equal for two objects over the same memory."""
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
