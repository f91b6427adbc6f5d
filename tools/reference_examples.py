"""Examples and facts that the language's reference shows beside what it reads from the package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

VALUES: Mapping[str, Any] = {
    "x": torch.tensor([1.0, -2.0]),
    "M": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    "ids": torch.tensor([1, 0]),
    "image": torch.ones(1, 1, 3, 3),
    "kernel": torch.ones(1, 1, 2, 2),
    "sequence": torch.ones(5, 3),
    "gates": torch.ones(2, 16, 3),
    "again": torch.ones(2, 16, 4),
    "bias": torch.zeros(2, 16),
    "places": [0, -1],
    "name": "relu",
}
"""What the examples of operators read."""

OPERATOR_EXAMPLES: Mapping[str, str] = {
    "abs": "abs(x)",
    "activation": "activation(name, x)",
    "add": "add(x, 1)",
    "choose": "choose(x, x, 5 * x)",
    "concat": "concat(x, x)",
    "conv2d": "conv2d(image, kernel)",
    "count": "count(places)",
    "detach": "detach(x)",
    "div": "div(x, 2)",
    "divisor": "divisor(12, 5)",
    "dropout": "dropout(x, 0.5)",
    "embedding": "embedding(ids, M)",
    "exp": "exp(0)",
    "eye_like": "eye_like(M)",
    "floor": "floor(2.5)",
    "gelu": "gelu(x)",
    "layer_norm": "layer_norm(x)",
    "linear": "linear(x, M)",
    "log": "log(1)",
    "lstm": "lstm(sequence, gates, again, bias, bias)",
    "matmul": "matmul(M, M)",
    "max": "max(2, 3)",
    "mean": "mean(M, 0)",
    "mul": "mul(x, x)",
    "neg": "neg(x)",
    "norm": "norm(M, [0, 1])",
    "ones_like": "ones_like(x)",
    "pow": "pow(x, 2)",
    "put_rows": "put_rows(M, [1], zeros_like(M[:1]))",
    "qr": "abs(qr(M, 1)[0])",
    "relu": "relu(x)",
    "reshape": "reshape(M, [4])",
    "sigmoid": "sigmoid(x)",
    "silu": "silu(x)",
    "size": "size(M, 0)",
    "skew": "skew(x[:1], 2)",
    "small_factor": "small_factor(12, 5)",
    "softmax": "softmax(x)",
    "sqrt": "sqrt(4)",
    "sub": "sub(x, 1)",
    "sum": "sum(M, -1)",
    "svd": "svd(M, 1)[1]",
    "take_rows": "take_rows(M, [1])",
    "tanh": "tanh(x)",
    "transpose": "transpose(M)",
    "view_as": "view_as(M, reshape(M, [4]))",
    "zeros_like": "zeros_like(x)",
}

SITE_VALUES: Mapping[str, Mapping[str, Any]] = {
    "linear": {"x": torch.tensor([[[1.0, 2.0], [3.0, 6.0]]])},
    "experts": {
        "x": torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]),
        "A": torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]),
    },
    "attention": {
        "q": torch.ones(1, 4, 3, 8),
        "k": torch.ones(1, 2, 3, 8),
        "v": torch.ones(1, 2, 3, 8),
        "mask": torch.zeros(1, 1, 3, 3),
        "P": torch.ones(5, 2, 8),
        "x": torch.ones(1, 3, 32),
    },
    "residual": {"h": torch.tensor([[[1.0, 3.0], [3.0, 9.0]]])},
    "inputs": {
        "embeds": torch.ones(1, 3, 8),
        "mask": torch.ones(1, 3, dtype=torch.long),
        "positions": torch.arange(3)[None],
        "P": torch.ones(2, 8),
        "places": [0, -1],
        "answers": torch.tensor([[[0.1, 0.9]], [[0.8, 0.2]], [[0.3, 0.7]]]),
    },
    "positions": {"p": torch.tensor([4, 5])},
}
"""What the examples of site functions read, by kind."""

SITE_EXAMPLES: Mapping[str, Mapping[str, str]] = {
    "linear": {"token_mean": "token_mean(x)"},
    "experts": {"expert_linear": "expert_linear(x, A)"},
    "attention": {
        "attention": "attention(q, k, v, mask)",
        "concat": "concat(tokens(P), k)",
        "extend": "extend(mask, 5)",
        "token_mean": "token_mean(x)",
        "tokens": "tokens(P)",
        "unmasked": "unmasked(k)",
    },
    "residual": {"norm": "norm(h)", "token_mean": "token_mean(h)"},
    "inputs": {
        "arrange": "arrange(extend(positions, 2, 9), places)",
        "concat": "concat(tokens(P), embeds)",
        "extend": "extend(mask, 2, 0)",
        "repeat": "repeat(positions, 2)",
        "shift": "shift(positions, 2)",
        "split": "split(repeat(positions, 2), 2)",
        "tokens": "tokens(P)",
        "votes": "votes(answers)",
    },
    "positions": {"precede": "precede(p, 2)"},
}

INITIALISER_EXAMPLES: Mapping[str, str] = {
    "eye": "eye",
    "kaiming_uniform": "kaiming_uniform(sqrt(5))",
    "normal": "normal(0.02)",
    "ones": "3 * ones",
    "rows": "rows(W, places)",
    "sample": "sample(W)",
    "uniform": "uniform(-1, 1)",
    "xavier_uniform": "xavier_uniform",
    "zeros": "zeros",
}
STORE_EXAMPLES: Mapping[str, str] = {"fp4": "fp4(128, False)", "nf4": "nf4(64)"}

FACTS: Mapping[str, Mapping[str, str]] = {
    "linear": {
        "op": "the graph's operation: linear, addmm, mm, bmm, ...",
        "kind": "of a projection of attention: self, cross, or linear where there is no softmax",
    },
    "experts": {"op": "the graph's operation: bmm, _grouped_mm, linear (in a loop), ..."},
    "embedding": {"op": "embedding"},
    "conv": {
        "op": "the graph's operation: conv1d, conv2d, convolution, ...",
        "rank": "how many dimensions the kernel has",
        "transposed": "whether it is a transposed convolution",
    },
    "attention": {
        "kind": "self (queries and keys come from one value) or cross",
        "causal": "whether later tokens are hidden from earlier ones",
        "op": "sdpa (one fused operation) or softmax (written out)",
        "transposed": "whether the graph keeps keys as (head_dim, tokens)",
    },
    "residual": {
        "after": "the sublayer that ends there: attention, ffn or other",
        "kind": "after attention: self or cross",
        "norm": "where the sublayer's norm is: pre, post or none",
        "parallel": "whether several sublayers are added at once",
        "features": "the axis of the stream that has its features: -1, or 1 in an image",
    },
    "inputs": {},
    "positions": {
        "kind": "token (a number for each token) or key (one for each pair of query and key)",
        "causal": "whether the attention that they are for hides later tokens from earlier ones",
        "op": "the graph's operation",
    },
    "norm": {"op": "the graph's operation, or what it computes", "eps": "its epsilon, if known"},
    "parameter": {
        "kind": "weight, bias, norm, embedding or other",
        "of": "the kind of the site that reads it: linear, norm, ..., or other",
    },
}
"""The facts of each kind's sites that `where` can ask for, besides the sizes."""
