"""Site functions of ``inputs``: functions of token sequences.

    embeds (batch, tokens, width)     mask, labels, positions, types (batch, tokens)

They are plain torch code, so a rule reads the same over a graph and over tensors. What a call of
the model does not give is None, and stays so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peftsurgery.language.site_functions.sites import entries
from peftsurgery.lazily import torch

if TYPE_CHECKING:
    from torch import Tensor


def tokens(P: Tensor) -> Tensor:
    """Embeddings that are no token's, the same for every text: P is (length, width)."""
    return P.unsqueeze(0)


def concat(a: Tensor, b: Tensor) -> Tensor:
    """Concatenate a's tokens before b's; each row of a serves an equal share of b's rows."""
    share = b.shape[0] // a.shape[0]
    rows = a.unsqueeze(1).expand(-1, share, -1, -1).flatten(0, 1)
    return torch.cat((rows, b), 1)


def extend(x: Any, length: int, value: int = 1) -> Any:
    """A mask, labels or ids for ``length`` more tokens on the left; 1 lets a mask show them."""
    if x is None:
        return None
    new = torch.full_like(x[:, :1], value).expand(-1, length)
    return torch.cat((new, x), 1)


def arrange(x: Any, places: Sequence[int]) -> Any:
    """Move the first ``len(places)`` tokens of each text to their places among the others.

    Number i goes before the token that has number ``places[i]`` among the others, counted from
    the end if it is negative, and behind them all if there are not so many. No places move nothing.
    """
    if x is None or not places:
        return x
    return torch.index_select(x, 1, _order(_numbers(x), places))


def shift(positions: Any, length: int, places: Sequence[int] = ()) -> Any:
    """Position ids for ``length`` more tokens, on the left or in the places that they have.

    A new token has the position of the token it stands before, which moves on by one; new tokens
    at the very start have 0, 1, ...
    """
    if positions is None:
        return None
    numbers = _numbers(extend(positions, length))
    new = _order(numbers, places or [0] * length) < length
    before = torch.cumsum(new, 0) - new.long()
    old, count = numbers - before, positions.shape[1]
    moved = torch.index_select(positions, 1, old.clamp(max=count - 1)) + (old == count)
    return moved.masked_fill(new & (old == 0), 0) + before


def repeat(x: Any, times: int) -> Any:
    """The whole batch so many times, one after the other."""
    return None if x is None else torch.cat([x] * times, 0)


def split(x: Tensor, times: int) -> Tensor:
    """What :func:`repeat` joined: (times * batch, ...) as (times, batch, ...)."""
    return x.unflatten(0, (times, -1))


def votes(x: Tensor) -> Tensor:
    """Vote share of each class: the fraction of the first axis whose argmax it is."""
    return torch.zeros_like(x).scatter(-1, x.argmax(-1, keepdim=True), 1.0).mean(0)


SEQUENCES = entries(tokens, concat, extend, arrange, shift, repeat, split, votes)


def _numbers(x: Tensor) -> Tensor:
    """0, 1, 2, ... for the tokens of x, which may be a graph's value: no size of it is known."""
    first = x.transpose(0, 1).flatten(1)[:, 0]
    return torch.cumsum(torch.ones_like(first, dtype=torch.int64), 0) - 1


def _order(numbers: Tensor, places: Sequence[int]) -> Tensor:
    """Which token comes where, if the first have these places among the others."""
    count = len(places)
    rest = numbers[count:] - count
    wanted = numbers.new_tensor(list(places))
    wanted = torch.where(wanted < 0, wanted + rest.shape[0], wanted)
    # a token that is moved stands before the one whose number it has
    return torch.argsort(torch.cat((2 * wanted, 2 * rest + 1)), stable=True)
