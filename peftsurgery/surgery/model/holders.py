"""Holders: modules that hold the parameters that rules add."""

from __future__ import annotations

from torch import nn

from peftsurgery.capture import ModuleInfo
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


def add_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Add a parameter, in new parts where there are none. PSG304 if its name is taken."""
    path, _, leaf = name.rpartition(".")
    holder: nn.Module = module
    for part in path.split("."):
        if part not in holder._modules:
            if hasattr(holder, part):
                hint = "apply under another name: apply(..., name='second')"
                raise SurgeryError("PSG304", f"'{path}' is not free: '{part}' is taken", hint)
            made = Adapter(ModuleInfo("Adapter"))
            made.training = module.training
            holder.add_module(part, made)
        holder = holder.get_submodule(part)
    if leaf not in holder._parameters and hasattr(holder, leaf):
        hint = "apply under another name, or give the rule's parameter another"
        raise SurgeryError("PSG304", f"a module has no place for '{leaf}': it is taken", hint)
    holder.register_parameter(leaf, parameter)
