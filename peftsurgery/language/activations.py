"""Activations by name: the operator that lets a setting choose among them.

The names are those that configurations use: transformers' ``hidden_act``, AdapterHub's
``non_linearity``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import TYPE_CHECKING

from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.language.operators import operator
from peftsurgery.lazily import functional as F
from peftsurgery.lazily import torch

if TYPE_CHECKING:
    from torch import Tensor


def identity(x: Tensor) -> Tensor:
    """Return x as it is."""
    return x


def quick_gelu(x: Tensor) -> Tensor:
    """The product x σ(1.702 x) (Hendrycks and Gimpel, 2016, arXiv:1606.08415)."""
    return x * torch.sigmoid(1.702 * x)


def squared_relu(x: Tensor) -> Tensor:
    """The square of max(x, 0) (So et al., 2021, arXiv:2109.08668)."""
    return torch.square(F.relu(x))


def gelu_tanh(x: Tensor) -> Tensor:
    """The product x Φ(x), with Φ by the hyperbolic tangent (the same paper, section 2)."""
    return F.gelu(x, approximate="tanh")


# What computes each: a function here, or one of torch, by its path.
ACTIVATIONS: Mapping[str, str | Callable[[Tensor], Tensor]] = {
    "elu": "nn.functional.elu",
    "gelu": "nn.functional.gelu",
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "identity": identity,
    "leaky_relu": "nn.functional.leaky_relu",
    "leakyrelu": "nn.functional.leaky_relu",
    "linear": identity,
    "mish": "nn.functional.mish",
    "quick_gelu": quick_gelu,
    "relu": "nn.functional.relu",
    "relu2": squared_relu,
    "relu6": "nn.functional.relu6",
    "sigmoid": "sigmoid",
    "silu": "nn.functional.silu",
    "softplus": "nn.functional.softplus",
    "swish": "nn.functional.silu",
    "tanh": "tanh",
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
    return attrgetter(function)(torch)(x) if isinstance(function, str) else function(x)
