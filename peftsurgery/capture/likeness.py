"""What trainers and other libraries see when they look at a captured model: the original.

They read the signature of ``forward`` to tell which columns of a dataset are inputs and which are
labels, the class's name for the task, and a few attributes for how the loss is made. A captured
model answers as the original would.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import SurgeryError
from .parts import Block, Part

if TYPE_CHECKING:
    from .sources import Source


def become_like(model: nn.Module, original: type[nn.Module]) -> None:
    """Give a model the class that is its own with the signature of the original's forward."""
    classes: tuple[Any, Any] = type(model), original
    model.__class__ = _class_like(*classes)


@lru_cache(maxsize=256)
def _class_like(kind: type[nn.Module], original: type[nn.Module]) -> type[nn.Module]:
    """``kind`` with the signature of ``original``'s forward, and both names in its own."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return kind.forward(self, *args, **kwargs)

    forward.__doc__ = kind.forward.__doc__
    vars(forward)["__signature__"] = inspect.signature(original.forward)
    name = f"{kind.__name__}[{original.__name__}]"
    return type(name, (kind,), {"forward": forward, "__module__": kind.__module__})


class Likeness(Part):
    """The attributes of the original that others ask a model for."""

    @property
    @abstractmethod
    def source(self) -> Source:
        """Where the model and its weights come from."""

    @property
    def config(self) -> Any:
        """The transformers config of the original; AttributeError if it has none."""
        return self.source.module.config

    @property
    def main_input_name(self) -> Any:
        """The argument that a batch is counted by; AttributeError if the original has none."""
        return self.source.module.main_input_name

    @property
    def loss_type(self) -> Any:
        """How the original names its loss; AttributeError if it does not."""
        return self.source.module.loss_type

    @property
    def accepts_loss_kwargs(self) -> Any:
        """Whether the original takes the number of items in a batch, if it says so."""
        return self.source.module.accepts_loss_kwargs

    def can_generate(self) -> bool:
        """Whether the original can; pipelines ask. AttributeError if it is not transformers'."""
        original: Any = self.source.module
        return bool(original.can_generate())

    def _supports_logits_to_keep(self) -> bool:
        """Whether the original gives the last logits alone; assisted generation asks."""
        original: Any = self.source.module
        return bool(original._supports_logits_to_keep())

    @property
    def device(self) -> torch.device:
        """Where the first parameter is."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first parameter that holds real numbers."""
        floating = (p.dtype for p in self.parameters() if p.is_floating_point())
        return next(floating, torch.get_default_dtype())

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
