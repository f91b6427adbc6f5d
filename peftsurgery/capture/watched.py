"""What is done to a part from outside: noted if the part is to be called for it, or refused."""

from __future__ import annotations

import functools
from typing import Any, Protocol

from torch import nn
from torch.utils.hooks import RemovableHandle

from peftsurgery.capture.names import join
from peftsurgery.capture.randomness import RATE
from peftsurgery.errors import SurgeryError

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CONSTANTS = (bool, int, float, str)
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class Listener(Protocol):
    """Receiver of paths of parts that must be called."""

    def note(self, path: str) -> None:
        """Mark the part at a path as one that must be called."""


def _noting(name: str) -> Any:
    """A method by which modules register a hook; the part is really called from then on."""

    def register(self: Watched, *args: Any, **kwargs: Any) -> RemovableHandle:
        self._note()
        handle: RemovableHandle = getattr(super(Watched, self), name)(*args, **kwargs)
        return handle

    return functools.wraps(getattr(nn.Module, name))(register)


class Watched(nn.Module):
    """A module that notes hooks, a forward of its own and modules put in its parts' places."""

    _watching: Listener | None = None
    _path: str = ""

    def watch(self, listener: Listener, path: str) -> None:
        """Note from now on, for the part at ``path``, what makes it called; "" is the model."""
        vars(self)["_watching"], vars(self)["_path"] = listener, path
        vars(self)["_originals"] = dict(self._modules)

    @property
    def itself(self) -> Watched:
        """The module: graphs read it by name, as they read a tensor."""
        return self

    def original_part(self, name: str) -> Any:
        """The captured part of that name, even if another module replaced it."""
        return vars(self)["_originals"][name]

    @property
    def is_awaited(self) -> bool:
        """Whether something waits for this module to be called."""
        return "forward" in vars(self) or any(vars(self)[hooks] for hooks in HOOKS)

    def _note(self, name: str | None = None) -> None:
        """Mark this part, or the replaced one of its parts, as one that must be called."""
        path = self._path if name is None else join(self._path, name)
        if self._watching is not None and path:
            self._watching.note(path)

    register_forward_pre_hook = _noting("register_forward_pre_hook")
    register_forward_hook = _noting("register_forward_hook")
    register_full_backward_pre_hook = _noting("register_full_backward_pre_hook")
    register_full_backward_hook = _noting("register_full_backward_hook")
    register_backward_hook = _noting("register_backward_hook")

    def __setattr__(self, name: str, value: Any) -> None:
        if self._watching is not None:
            if name == "forward":
                self._note()
            elif isinstance(value, nn.Module) or name in vars(self)["_originals"]:
                self._put(name, value)
            elif _is_constant(self, name) and vars(self)[name] != value:
                message = f"'{join(self._path, name)}' is a constant of the capture"
                hint = "set it on the original, and capture that again"
                raise SurgeryError("PSG220", message, hint)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if self._watching is not None and name in vars(self)["_originals"]:
            raise _unchanging(self._path, name, "taken out")
        super().__delattr__(name)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As any module's; lists have the elements that the capture calls."""
        if self._watching is not None:
            self._put(name, module)
        super().add_module(name, module)

    def _put(self, name: str, module: nn.Module | None) -> None:
        """Record that a module replaces a part. Raises PSG220 where no part is, or a list grows."""
        originals = vars(self)["_originals"]
        if name in originals and not isinstance(module, nn.Module):
            raise _unchanging(self._path, name, "taken out")
        if name in originals and not _holds_alike(originals[name], module):
            raise _unchanging(self._path, name, "another list of modules")
        if name in originals:
            self._note(name)
        elif isinstance(self, _LISTS) and not _is_beside(module):
            raise _unchanging(self._path, name, "added")


def _is_beside(module: Any) -> bool:
    """Whether a module is one of ours that no model watches: what a surgery puts beside parts."""
    return isinstance(module, Watched) and module._watching is None


def _holds_alike(original: nn.Module, module: Any) -> bool:
    """Whether a module can be in a part's place: in that of a list, one of blocks that stand in.

    Captures call the elements of a list, and never the list: other modules are put in it, where
    they are noted.
    """
    if module is original or not isinstance(original, nn.ModuleList | nn.ModuleDict):
        return True
    mine, theirs = vars(original).get("_originals", original._modules), module._modules
    return mine.keys() == theirs.keys() and all(
        isinstance(theirs[key], Watched) and _labels(mine[key]) <= _labels(theirs[key])
        for key in mine
    )


def _labels(part: Any) -> frozenset[str]:
    """What a block is called by, if it is one."""
    return frozenset(vars(part).get("programs", ()))


def original_at(model: Any, path: str) -> Any:
    """The captured module at a path, even if another module replaced it."""
    part = model
    for name in path.split(".") if path else ():
        known = vars(part).get("_originals", {})
        part = known[name] if name in known else part.get_submodule(name)
    return part


def _is_constant(part: nn.Module, name: str) -> bool:
    """Whether a graph may have this attribute as a constant; of a dropout it reads the rate."""
    public = name in vars(part)["_settings"] and not name.startswith("_")
    is_rate = name == RATE and isinstance(part, nn.modules.dropout._DropoutNd)
    return public and not is_rate and isinstance(vars(part)[name], _CONSTANTS)


def _unchanging(path: str, name: str, what: str) -> SurgeryError:
    message = f"'{join(path, name)}' cannot be {what}: the capture calls the modules there were"
    hint = "put another module in a part's place, or change the original and capture it again"
    return SurgeryError("PSG220", message, hint)
