"""Operator table: the traits of ATen operators, one row for all that behave alike.

torch's own tags and schemas come first: what is a view, works entry by entry or reduces is read
there, for every operator there is. The table adds what they do not say.

Three traits are told apart that are easily all called a view. VIEW is about memory: what is written
there is written here. RESHAPE is about axes: entries keep their order under others, in a copy too,
so rows of a matrix can be followed. CAST is about neither: sizes stay, and so do the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Flag, auto
from functools import cache
from typing import Any

import torch
from torch import fx

from peftsurgery.capture.schemas import name_of, op, shares_memory, writes


class Trait(Flag):
    """Traits of an operator: what it does with its operands."""

    POINTWISE = auto()  # every entry by itself, says torch's tag
    REDUCTION = auto()  # many entries make one, says torch's tag
    VIEW = auto()  # the result shares the operand's memory, says the schema
    LAYOUT = auto()  # entries are moved, and nothing else is done to them: by views, and by copies
    CAST = auto()  # the same entries where they were: of another dtype, in other memory
    RESHAPE = auto()  # the same entries in the same order, under other axes
    EXPANSION = auto()  # entries are repeated without a copy
    PARTING = auto()  # entries are taken apart, or put in another order
    PICK = auto()  # entries are taken by their indices
    FILL = auto()  # some entries are replaced, the others stay
    ADDITION = auto()
    SCALING = auto()
    COMPARISON = auto()  # which of two is greater
    ACTIVATION = auto()
    NORM = auto()
    DROPOUT = auto()
    SOFTMAX = auto()
    PRODUCT = auto()  # of matrices
    CONV = auto()
    ATTENTION = auto()
    CHOICE = auto()  # which entries are greatest
    COUNT = auto()  # 0, 1, 2, ...
    SCAN = auto()  # every entry is made of those before it
    TOTAL = auto()  # entries are added up, or their squares
    WAVE = auto()  # cosines and sines
    TRIANGLE = auto()
    LIKE = auto()  # a new tensor of an operand's shape and dtype, and of nothing in it
    OPAQUE = auto()  # what comes out is no longer the signal that went in


@dataclass(frozen=True)
class Meaning:
    """Meaning of operators: one row of the table.

    ``neutral`` is the second operand that leaves the first as it is. Of a product with a weight,
    ``operands`` are the positions of x, of the weight and, if it takes one, of the bias; ``turned``
    says that the weight is multiplied as it stands, so that it is (in, out).
    """

    traits: Trait
    neutral: int | None = None
    operands: tuple[int, ...] = ()
    turned: bool = False


_COPY, _PRODUCT = Trait.LAYOUT, Trait.PRODUCT | Trait.OPAQUE

_ROWS: Mapping[str, Meaning] = {
    # layout: views are known to be, so only copies are called so here
    "clone _to_copy type_as lift_fresh_copy": Meaning(Trait.CAST | _COPY),
    "to contiguous alias detach lift_fresh": Meaning(Trait.CAST),
    "_unsafe_view": Meaning(Trait.RESHAPE | _COPY),
    "view reshape view_as reshape_as flatten unflatten": Meaning(Trait.RESHAPE),
    "expand expand_as broadcast_to": Meaning(Trait.EXPANSION),
    "slice select narrow split split_with_sizes chunk tensor_split unbind": Meaning(Trait.PARTING),
    "flip roll": Meaning(Trait.PARTING | _COPY),
    "repeat repeat_interleave cat concat stack getitem with_past loop_joined": Meaning(_COPY),
    "loop_carried": Meaning(_COPY),
    # entries by their indices
    "gather index index_select": Meaning(Trait.PICK),
    "masked_scatter copy scatter index_put index_copy slice_scatter select_scatter": Meaning(
        Trait.FILL
    ),
    "pad constant_pad_nd clamp clamp_min clamp_max nan_to_num": Meaning(Trait.FILL),
    "where": Meaning(Trait.FILL | Trait.POINTWISE),  # torch tags some of its overloads alone
    "masked_fill": Meaning(Trait.FILL | Trait.POINTWISE, neutral=0),
    # arithmetic
    "add sub rsub": Meaning(Trait.ADDITION, neutral=0),
    "mul div true_divide": Meaning(Trait.SCALING, neutral=1),
    "neg": Meaning(Trait.SCALING),
    "gt ge lt le greater greater_equal less less_equal": Meaning(Trait.COMPARISON),
    "cos sin": Meaning(Trait.WAVE),
    "sum norm linalg_vector_norm": Meaning(Trait.TOTAL),
    "cumprod logcumsumexp": Meaning(Trait.SCAN),
    "cumsum": Meaning(Trait.SCAN | Trait.OPAQUE),
    "arange iota": Meaning(Trait.COUNT),
    "tril triu": Meaning(Trait.TRIANGLE),
    "topk sort argsort argmax": Meaning(Trait.CHOICE | Trait.OPAQUE),
    "max": Meaning(Trait.CHOICE),
    # layers
    "gelu relu relu6 silu sigmoid tanh erf elu selu celu leaky_relu hardtanh hardswish": Meaning(
        Trait.ACTIVATION
    ),
    "hardsigmoid mish softplus prelu rrelu log_sigmoid glu": Meaning(Trait.ACTIVATION),
    "layer_norm rms_norm group_norm batch_norm instance_norm": Meaning(Trait.NORM),
    "dropout native_dropout feature_dropout bernoulli": Meaning(Trait.DROPOUT),
    "softmax _softmax": Meaning(Trait.SOFTMAX | Trait.OPAQUE),
    "embedding": Meaning(Trait.OPAQUE),
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution": Meaning(
        Trait.CONV | Trait.OPAQUE
    ),
    "scaled_dot_product_attention": Meaning(Trait.ATTENTION | Trait.OPAQUE),
    # products
    "linear": Meaning(_PRODUCT, operands=(0, 1, 2)),
    "inner": Meaning(_PRODUCT, operands=(0, 1)),
    "mm bmm matmul mv _grouped_mm grouped_mm_fallback": Meaning(
        _PRODUCT, operands=(0, 1), turned=True
    ),
    "addmm baddbmm": Meaning(_PRODUCT, neutral=0, operands=(1, 2, 0), turned=True),
    "einsum tensordot": Meaning(_PRODUCT),
    # new tensors
    "empty_like full_like ones_like zeros_like rand_like randn_like randint_like": Meaning(
        Trait.LIKE
    ),
    "new_empty new_empty_strided new_full new_ones new_zeros": Meaning(Trait.LIKE),
}
TABLE: Mapping[str, Meaning] = {name: row for names, row in _ROWS.items() for name in names.split()}
"""The row of every operator that has one, by its name as ``op`` gives it."""


def meaning(node: fx.Node) -> Meaning:
    """Look up the row of a node's operator; a row without traits if there is none."""
    return TABLE.get(op(node), _NONE)


_NONE = Meaning(Trait(0))


def has(node: fx.Node, some: Trait) -> bool:
    """Whether a node's operator has any of these traits, by torch's schema or the table."""
    return node.op == "call_function" and bool(traits(node.target) & some)


@cache
def traits(target: Any) -> Trait:
    """All traits of an operator."""
    found = TABLE.get(name_of(target), _NONE).traits
    tags = getattr(target, "tags", ())
    if torch.Tag.pointwise in tags:
        found |= Trait.POINTWISE
    if torch.Tag.reduction in tags:
        found |= Trait.REDUCTION
    if shares_memory(target) and not writes(target):
        found |= Trait.VIEW | Trait.LAYOUT
    return found
