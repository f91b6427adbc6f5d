"""State dicts of operated models: what was learnt, and the buffers; not the base's parameters.

So a checkpoint of any trainer is small, and whatever shares memory in the base (tied embeddings)
is no obstacle to writing it. Reading one leaves the base as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

if TYPE_CHECKING:
    from peftsurgery.surgery.model.operated import OperatedModel


def keep_learnt(model: OperatedModel) -> None:
    """Leave the base's parameters out of the model's state dicts, written and read."""
    model.register_state_dict_pre_hook(_fill)
    model.register_state_dict_post_hook(_leave_out)
    model.register_load_state_dict_pre_hook(_put_back)


def _fill(module: nn.Module, *_: Any) -> None:
    """What is trained of a base that was not read yet has no numbers to write, or to write over."""
    cast("OperatedModel", module).fill()


def _leave_out(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name in _of_base(module):
        state.pop(prefix + name, None)


def _put_back(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Base parameters stay the model's own, whether they are there or not.

    Their memory is shared with the model that was captured: nothing may be copied into it.
    """
    _fill(module)
    cast("OperatedModel", module).rename(state, prefix)
    for name, parameter in _of_base(module).items():
        state[prefix + name] = parameter


def _of_base(module: nn.Module) -> dict[str, nn.Parameter]:
    """The base's own parameters, by the names they have now."""
    names = cast("OperatedModel", module).base_names
    parameters = module.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in parameters if name in names}
