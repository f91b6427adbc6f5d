"""Holders: modules that hold the parameters that rules add."""

from __future__ import annotations

from torch import nn

from peftsurgery.capture.modules import Part
from peftsurgery.errors import SurgeryError


class Adapter(Part):
    """What an operation added beneath a module: the parameters of its cut."""

    def _note(self, name: str | None = None) -> None:
        what = "hooks on an adapter would never be called: its parameters are read, one by one"
        raise SurgeryError("PSG220", what, "put them on the module that it is beneath")

    def extra_repr(self) -> str:
        """The parameters and their shapes."""
        return ", ".join(
            f"{name}={list(p.shape)}" for name, p in self._parameters.items() if p is not None
        )


def register(holder: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Give a module a parameter. PSG304 if it has something else of that name."""
    if name not in holder._parameters and hasattr(holder, name):
        hint = "apply under another name, or give the rule's parameter another"
        raise SurgeryError("PSG304", f"a module has no place for '{name}': it is taken", hint)
    holder.register_parameter(name, parameter)
