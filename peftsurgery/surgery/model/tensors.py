"""The base's tensors in a model made of it: shared, and replaced under all their names."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from peftsurgery.capture.tensors import owner_of


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter of one's own over the same memory, not trained."""
    return nn.Parameter(tensor.detach(), requires_grad=False)


def share(
    mine: nn.Module, other: nn.Module, names: Iterable[str], there: Callable[[str], str]
) -> None:
    """Share the tensors that ``other`` has now, which may have been cast or moved, and its modes.

    ``names`` are those of the tensors, ``there`` gives the name that ``other`` has one under. What
    is one tensor there is one here. Buffers are copied, since training changes them in place.
    """
    parameters: dict[int, nn.Parameter] = {}
    buffers: dict[int, Tensor] = {}
    for name in names:
        part, leaf = owner_of(mine, name)
        tensor = getattr(*owner_of(other, there(name)))
        if leaf in part._parameters:
            part._parameters[leaf] = parameters.setdefault(id(tensor), frozen(tensor))
        else:
            part._buffers[leaf] = buffers.setdefault(id(tensor), tensor.detach().clone())
    for path, part in mine.named_modules():
        part.training = other.get_submodule(path).training


def put(module: nn.Module, names: Iterable[str], value: Tensor) -> None:
    """Give a parameter, under all of these names, another tensor."""
    parameter = frozen(value)
    for name in names:
        part, leaf = owner_of(module, name)
        part._parameters[leaf] = parameter
