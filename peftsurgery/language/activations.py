"""Activations by name: the operator that lets a setting choose among them.

The names are those that configurations use: transformers' ``hidden_act``, AdapterHub's
``non_linearity``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.language.operators import operator


def identity(x: Tensor) -> Tensor:
    """Return x as it is."""
    return x


def quick_gelu(x: Tensor) -> Tensor:
    """The product x σ(1.702 x) (Hendrycks and Gimpel, 2016, arXiv:1606.08415)."""
    return x * torch.sigmoid(1.702 * x)


def squared_relu(x: Tensor) -> Tensor:
    """The square of max(x, 0) (So et al., 2021, arXiv:2109.08668)."""
    return torch.square(F.relu(x))


_GELU_TANH = partial(F.gelu, approximate="tanh")

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "gelu": F.gelu,
    "gelu_new": _GELU_TANH,
    "gelu_pytorch_tanh": _GELU_TANH,
    "identity": identity,
    "leaky_relu": F.leaky_relu,
    "leakyrelu": F.leaky_relu,
    "linear": identity,
    "mish": F.mish,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "relu2": squared_relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": F.softplus,
    "swish": F.silu,
    "tanh": torch.tanh,
}


@operator("activation", maths="{0}({1})")
def activation(name: str, x: Tensor) -> Tensor:
    """The activation called ``name``, a setting (relu, swish, gelu, gelu_new, tanh...), of x.

    Raises PSG124 if there is none of that name.
    """
    function = ACTIVATIONS.get(name) if isinstance(name, str) else None
    if function is None:
        hint = did_you_mean(str(name), ACTIVATIONS)
        raise SurgeryError("PSG124", f"there is no activation '{name}'", hint)
    return function(x)
