"""Site functions: what a rule may call at sites of one kind, beside the operators.

A site can run again what the model itself does there, with other values going in: an attention core
its scores, biases, softmax and dropout, a residual addition the norm that follows it. Surgery
replays the site's own nodes, and knows which axis holds the tokens. The plain definitions here are
what `peftsurgery rules check` computes with, where there is no model.

At an attention site every value has one layout, whatever the model's: q is (batch, heads, tokens,
head_dim), k and v are (batch, kv_heads, tokens, head_dim).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from peftsurgery.language.operators import Operator
from peftsurgery.lazily import functional as F
from peftsurgery.lazily import torch

if TYPE_CHECKING:
    from torch import Tensor

KEYS = 2
"""The dimension of tokens in the layout of an attention site's values."""


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> Tensor:
    """Run the core on these queries, keys, values and mask.

    Returns (batch, heads, tokens, head_dim).

    The model's own scores, biases, caps, softmax and dropout; None leaves the mask as it is, which
    is one for the keys that there were. Keys may be more than those: what the core adds to the
    scores by itself is 0 for the ones on the left.
    """
    repeats = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(repeats, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


def concat(a: Tensor, b: Tensor) -> Tensor:
    """The tokens of a before those of b, for every sequence of b's batch."""
    return torch.cat((a.expand(b.shape[0], -1, -1, -1), b), KEYS)


def tokens(P: Tensor) -> Tensor:
    """Keys or values that are no token's: P is (length, kv_heads, head_dim)."""
    return P.transpose(0, 1).unsqueeze(0)


def extend(mask: Any, length: int) -> Any:
    """The mask for ``length`` more keys on the left, which every query sees.

    It adds 0 to their scores, or says True where the model's masks are of that kind.
    """
    return None if mask is None else F.pad(mask, (length, 0))


def unmasked(k: Tensor) -> Tensor:
    """A mask for the keys k that hides none of them, whatever the core's own mask hides."""
    return k.new_zeros(1, 1, 1, k.shape[KEYS])


def expert_linear(x: Tensor, W: Tensor) -> Tensor:
    """The product of x, or of what has its rows, with one matrix for each expert.

    W is (experts, out, in). Each row meets the matrix of its expert, as it does in the site's own
    product, whether the model keeps rows in groups, in batches or by their experts' numbers.
    """
    return torch.matmul(x, W.transpose(-2, -1))


def precede(p: Tensor, length: int) -> Tensor:
    """The positions p, after those of ``length`` tokens that come right before the first."""
    first = p[..., :1].repeat_interleave(length, -1)
    return torch.cat((first + torch.ones_like(first).cumsum(-1) - (length + 1), p), -1)


def norm(h: Tensor) -> Tensor:
    """Apply the norm that the model applies to the sum to h; h itself where none follows."""
    return F.layer_norm(h, (h.shape[-1],))


def token_mean(v: Tensor) -> Tensor:
    """The mean of v over the tokens of each sequence, with one token left.

    v has the axes of x. The result goes with v, wherever the model keeps sequences and tokens; at
    an attention site it is (batch, 1, features).
    """
    # a row of a matrix is a sequence of one token; a proxy cannot say how many axes it has
    return v.unflatten(0, (-1, 1)).mean(-2, True).flatten(0, 1)


def core(heads: int, kv_heads: int, own_mask: Any) -> Mapping[str, Operator]:
    """The functions of one attention core, which take no more than a model's would.

    Keys and values have the core's own heads and the batch of its queries, and a mask is for the
    keys that it is given with.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> Tensor:
        for value, name, wanted in ((q, "queries", heads), (k, "keys", kv_heads)):
            _same(f"the {name} have", value.shape[1], "heads, and those of this core", wanted)
        _same("the values have", v.shape[1], "heads, and the keys", k.shape[1])
        _same("there are", v.shape[KEYS], "values for so many keys:", k.shape[KEYS])
        kind = "the mask that the core has" if mask is None else "the mask"
        mask = own_mask if mask is None else mask
        if mask is not None and mask.shape[-1] != k.shape[KEYS]:
            raise ValueError(
                f"{kind} is for {mask.shape[-1]} keys, and there are {k.shape[KEYS]}: give "
                "extend(mask, length) where keys come before the others, unmasked(k) for no mask"
            )
        return attention(q, k, v, mask)

    return {attention.__name__: replace(Operator.of(attention), function=attend)}


def _same(first: str, found: Any, second: str, wanted: Any) -> None:
    if found != wanted:
        raise ValueError(f"{first} {found} {second} {wanted}")


def entries(*functions: Callable[..., Any]) -> Mapping[str, Operator]:
    """The entries of site functions, by name."""
    return {function.__name__: Operator.of(function) for function in functions}


ATTENTION = entries(attention, concat, tokens, extend, unmasked, token_mean)
LINEAR = entries(token_mean)
EXPERTS = entries(expert_linear)
POSITIONS = entries(precede)
RESIDUAL = entries(norm, token_mean)
