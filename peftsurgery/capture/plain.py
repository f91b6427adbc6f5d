"""Whether a call is an ordinary one, which may be computed in another way that gives the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def is_plain_call(tensors: Sequence[Tensor]) -> bool:
    """Whether these are ordinary tensors, and nothing looks on while they are computed with."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._is_any_autocast_enabled()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and not torch._C._is_tracing()
        and are_plain(tensors)
    )


def are_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether these are ordinary tensors, whose operators do what is known of them."""
    return _PLAIN.issuperset(map(type, tensors))
