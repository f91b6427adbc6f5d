"""What the call of a block depends on, as far as two calls can be told apart by it.

The attributes of its parts and their tensors are compared as tokens (:mod:`likeness`), the tensors
also as they were before the trace, for blocks whose parameters are out of its sight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from peftsurgery.capture.attributes import MODULE_TABLES
from peftsurgery.capture.equal_blocks.alike import described
from peftsurgery.capture.equal_blocks.likeness import Token, TokenMaker
from peftsurgery.capture.parts import named_parts

_LONG = 16
# What a fake tensor has by itself.
_OF_FAKES = frozenset((*FakeTensor.__annotations__, *dir(FakeTensor)))
# Hooks that no call of it calls.
_QUIET = tuple(name for name in MODULE_TABLES if "state_dict" in name)

Attribute = tuple[str, str]  # a part's name beneath the block, and the attribute's


@dataclass(frozen=True)
class Situation:
    """All that a block's call depends on: of ``attributes``, only on those that are read."""

    parts: Token
    tensors: Token  # of its parts, as the trace has them; None if they are out of sight
    plain: Token  # the same before the trace
    given: Token  # the sizes of what is given: a trace may learn of them
    told: Token  # all else that is given
    around: Token
    attributes: dict[Attribute, Token]
    layers: dict[Attribute, Token]  # what the cache's layers are whose numbers attributes are
    kept: Sequence[Any]  # all that these are tokens of: nothing else gets their identity

    def agrees(self, other: Situation, unread: set[Attribute]) -> bool:
        """Whether a call here does what one does there, which reads none of ``unread``."""
        mine, theirs = self.attributes, other.attributes
        return (
            (self.parts, self.given, self.told) == (other.parts, other.given, other.told)
            and (
                self.plain == other.plain
                if None in (self.tensors, other.tensors)
                else self.tensors == other.tensors
            )
            and self.around == other.around
            and mine.keys() == theirs.keys()
            and all(mine[key] == theirs[key] or key in unread for key in mine)
        )


def told_of_tensors(table: Mapping[str, Any], which: dict[int, int]) -> Token:
    """What a trace can see of tensors; ``which`` numbers them, as one may be there twice."""
    return tuple(
        (
            name,
            tensor
            if tensor is None
            else (described(tensor), which.setdefault(id(tensor), len(which))),
        )
        for name, tensor in table.items()
    )


def number_tensors(tables: Iterable[Mapping[str, Any]], which: dict[int, int]) -> None:
    """Number the tensors of tables as they would be numbered to be told of."""
    for table in tables:
        for tensor in table.values():
            if tensor is not None:
                which.setdefault(id(tensor), len(which))


def told_beside(tensor: torch.Tensor) -> dict[str, Any]:
    """What code has put into a tensor's attributes."""
    return {
        name: value
        for name, value in vars(tensor).items()
        if name not in _OF_FAKES and value is not None and not name.endswith(("_vc", "_epoch"))
    }


def told_of_attributes(
    parts: list[tuple[str, nn.Module]], tokens: TokenMaker
) -> dict[Attribute, Token]:
    """What the parts of a block keep in attributes, tensors and parts aside."""
    own = {
        (name, key): tokens.of(value)
        for name, part in parts
        for key, value in vars(part).items()
        if key not in MODULE_TABLES
    }
    quiet = ((name, key, vars(part)[key]) for name, part in parts for key in _QUIET)
    return own | {(name, key): tokens.of(tuple(hooks.values())) for name, key, hooks in quiet}


def told_apart(blocks: list[nn.Module]) -> set[tuple[type, str]]:
    """The attributes in which blocks of one class differ, with the class of the part."""
    tokens = TokenMaker()
    first: dict[type, dict[Attribute, Token]] = {}
    found: set[tuple[type, str]] = set()
    for block in blocks:
        parts = named_parts(block, remove_duplicate=False)
        kinds = {name: type(part) for name, part in parts}
        mine = told_of_attributes(parts, tokens)
        other = first.setdefault(type(block), mine)
        differing = (key for key in mine if key in other and mine[key] != other[key])
        found |= {(kinds[name], key) for name, key in differing}
    return found


def told_by_number(blocks: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """The paths of blocks that differ from the second of their list by their numbers alone.

    Those of short lists are left out: a guess gains little there, and a wrong one costs a trace.
    """
    tokens, lists = TokenMaker(), dict[str, list[str]]()
    for path in blocks:
        home, _, number = path.rpartition(".")
        if number.isdecimal():
            lists.setdefault(home, []).append(path)
    found: list[str] = []
    for home, paths in lists.items():
        second = blocks.get(f"{home}.1")
        if second is not None and len(paths) >= _LONG:
            like = _form(second, tokens)
            forms = ((path, _form(blocks[path], tokens)) for path in paths)
            found += [path for path, form in forms if _is_later(path, form, like)]
    return tuple(found)


def _form(block: nn.Module, tokens: TokenMaker) -> tuple[Token, dict[Attribute, Any]]:
    """What a block is made of, and the tokens of its attributes beside the numbers among them."""
    parts = named_parts(block, remove_duplicate=False)
    tensors = [(name, type(p), told_of_tensors(p._parameters, {}), p.training) for name, p in parts]
    numbers = {
        (name, key): value
        for name, part in parts
        for key, value in vars(part).items()
        if type(value) is int
    }
    return tensors, told_of_attributes(parts, tokens) | numbers


def _is_later(path: str, form: tuple[Token, Any], second: tuple[Token, Any]) -> bool:
    """Whether a block comes after the second, and has numbers as much higher, or the same."""
    later = int(path.rpartition(".")[2]) - 1
    mine, theirs = form[1], second[1]
    return (
        later > 0
        and form[0] == second[0]
        and mine.keys() == theirs.keys()
        and all(
            mine[key] == value or (type(value) is int and mine[key] == value + later)
            for key, value in theirs.items()
        )
    )
