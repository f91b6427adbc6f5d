"""State dicts of operated models: what was learnt, and the buffers; not the base's parameters.

So a checkpoint of any trainer is small, and whatever shares memory in the base (tied embeddings)
is no obstacle to writing it. Reading one leaves the base as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn

Prepare = Callable[[Any], None]
Names = Callable[[Any], Collection[str]]
Rename = Callable[[Any, dict[str, Tensor], str], None]


def keep_learnt(module: nn.Module, prepare: Prepare, of_base: Names, rename: Rename) -> None:
    """Leave the base's parameters out of a module's state dicts, written and read.

    All three are asked of the module, or of its copies: ``prepare`` reads weights, without which
    what is trained of the base has no numbers to write, or to write over; ``of_base`` gives the
    names of the base's parameters; ``rename`` gives what a state dict holds, beneath a prefix, the
    names that the module has for it.
    """

    def own(module: nn.Module) -> dict[str, nn.Parameter]:
        names, every = of_base(module), module.named_parameters(remove_duplicate=False)
        return {name: parameter for name, parameter in every if name in names}

    def leave_out(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        for name in own(module):
            state.pop(prefix + name, None)

    def put_back(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        """Their memory is shared with the model that was captured: nothing is copied into it."""
        prepare(module)
        rename(module, state, prefix)
        state.update({prefix + name: parameter for name, parameter in own(module).items()})

    module.register_state_dict_pre_hook(lambda module, *_: prepare(module))
    module.register_state_dict_post_hook(leave_out)
    module.register_load_state_dict_pre_hook(put_back)
