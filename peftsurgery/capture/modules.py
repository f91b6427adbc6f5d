"""The modules of a captured model: a tree with the original's names, in which only blocks compute.

Every module of the original has its counterpart, so state-dict names, ``named_modules``,
``model.layers[0]`` and ``print(model)`` are what they were. The code lives in the blocks (and in
the model itself), which are called like any module: hooks, checkpointing, sharding and per-block
compilation work on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peftsurgery.capture.calling import run_part
from peftsurgery.capture.classes import become_like
from peftsurgery.capture.compiling import Compiling
from peftsurgery.capture.copying import Copied
from peftsurgery.capture.names import join
from peftsurgery.capture.program import ModuleInfo, Program
from peftsurgery.capture.watched import HOOKS, Watched
from peftsurgery.errors import SurgeryError


class Part(Copied, Watched):
    """A module of the original: it holds tensors and parts, and is called if something waits."""

    # Classes made of this one and an original's are called in this way, and registered nowhere.
    __call__: Callable[..., Any] = nn.Module.__call__
    # What compiles the programs of this part, once that is asked of the model.
    compiling: Compiling | None = None

    def __init__(self, info: ModuleInfo) -> None:
        super().__init__()
        self._info = info

    def __init_subclass__(cls, **kwargs: Any) -> None:
        object.__init_subclass__()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original's module returns, in a call that the model makes. PSG204 in any other.

        The model makes it if something waits for it; else the code is in the block around it.
        """
        return run_part(self, args, kwargs, self._run)

    def _run(self, program: Program, inputs: Sequence[Any], recorded: bool = True) -> Any:
        """The outputs of a program of this part; ``recorded`` is whether gradients may be."""
        runnable = self.runnable(program)
        if recorded or torch.compiler.is_compiling():
            return runnable.forward(self, *inputs)
        return runnable.no_grad(self, *inputs)

    def runnable(self, program: Program) -> Program:
        """A program as this part runs it: compiled, if that is asked."""
        return program if self.compiling is None else self.compiling.program(program)

    def __repr__(self) -> str:
        return self._shown_name() + super().__repr__().removeprefix(self._get_name())

    def _shown_name(self) -> str:
        return self._get_name()

    def extra_repr(self) -> str:
        """The settings the original shows."""
        return self._info.settings


class Block(Part):
    """One element of a repeated list, with one program for each way in which captures call it."""

    def __init__(self, info: ModuleInfo) -> None:
        super().__init__(info)
        self.programs: dict[str, Program] = {}
        self.checkpointing = False

    def forward(
        self, *args: Any, program: str | None = None, recorded: bool = True, **kwargs: Any
    ) -> Any:
        """Run the program of that label; without one, be called as the original is.

        Args are the values its graph takes (hidden states, masks, sizes), in the graph's order.
        ``recorded`` is False where the calling program knows that no gradient is recorded.
        """
        if program is None:
            return super().forward(*args, **kwargs)
        return self._run(self.programs[program], args, recorded)

    def _run(self, program: Program, inputs: Sequence[Any], recorded: bool = True) -> Any:
        """The outputs of a program, which is run again in the backward pass if that is asked."""
        if self.checkpointing and self.training and torch.is_grad_enabled():
            run = self.runnable(program).forward
            return checkpoint(run, self, *inputs, use_reentrant=False)
        return super()._run(program, inputs, recorded)

    @property
    def is_awaited(self) -> bool:
        """Whether hooks wait for this block, which is called anyway."""
        return any(vars(self)[hooks] for hooks in HOOKS)

    def program(self, label: str | None = None) -> Program:
        """The program of that label, or the first one."""
        return self.programs[label] if label else next(iter(self.programs.values()))

    def _shown_name(self) -> str:
        labels = ", ".join(self.programs)
        return f"Block[{labels or self._info.type}]"


def mirror(
    source: nn.Module,
    root: nn.Module,
    blocks: frozenset[str],
    infos: Mapping[str, ModuleInfo],
    parameter: Callable[[nn.Parameter], nn.Parameter],
) -> None:
    """Build beneath ``root`` the tree of ``source``, sharing the memory of its parameters.

    ``parameter`` makes the new tree's parameter of an original one; tied parameters stay tied.
    Buffers are copied, since training changes them in place (the statistics of batch norms).
    A module that occurs under several names occurs once here too.
    """
    made: dict[int, nn.Module] = {id(source): root}
    tensors: dict[int, nn.Parameter] = {}
    buffers: dict[int, torch.Tensor] = {}

    def build(original: nn.Module, copy: nn.Module, path: str) -> None:
        for name, value in original._parameters.items():
            if value is not None and id(value) not in tensors:
                tensors[id(value)] = parameter(value)
            copy.register_parameter(name, None if value is None else tensors[id(value)])
        for name, buffer in original._buffers.items():
            persistent = name not in original._non_persistent_buffers_set
            if buffer is not None and id(buffer) not in buffers:
                buffers[id(buffer)] = buffer.detach().clone()
            own_buffer = None if buffer is None else buffers[id(buffer)]
            copy.register_buffer(name, own_buffer, persistent=persistent)
        for name, child in original._modules.items():
            if child is None:
                continue
            inner = join(path, name)
            if hasattr(copy, name):
                message = f"the module '{inner}' has a name that a captured model needs for itself"
                raise SurgeryError("PSG209", message, "rename it in the model")
            if id(child) not in made:
                made[id(child)] = _counterpart(child, infos[inner], inner in blocks)
                build(child, made[id(child)], inner)
            copy.add_module(name, made[id(child)])
        copy.training = original.training

    build(source, root, "")


def own(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter over the same memory, so that casting or moving one leaves the other alone."""
    return nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)


def _counterpart(child: nn.Module, info: ModuleInfo, is_block: bool) -> nn.Module:
    made = Block(info) if is_block else Part(info)
    become_like(made, child)
    return made


def module_infos(module: nn.Module) -> dict[str, ModuleInfo]:
    """What every module of a model shows of itself, by path; "" is the model."""
    return {
        name: ModuleInfo(type(part).__name__, _settings(part))
        for name, part in module.named_modules(remove_duplicate=False)
    }


def _settings(part: nn.Module) -> str:
    return "" if isinstance(part, nn.ModuleList | nn.Sequential) else part.extra_repr()
