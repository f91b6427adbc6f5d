"""The shipped operators: the vocabulary of the rules, each a line of torch.

Arithmetic (``+ - * / @ **``) needs no entry to be evaluated; `add`, `mul` and the like are entries
so that patterns can name them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peftsurgery.language.operators import operator
from peftsurgery.lazily import functional as F
from peftsurgery.lazily import torch

if TYPE_CHECKING:
    from torch import Tensor

Number = float | int
Dimensions = int | tuple[int, ...]


@operator("add", commutative=True, maths="{0} + {1}", aten=("add",))
def add(a: Any, b: Any) -> Any:
    """The sum, written a + b outside patterns."""
    return a + b


@operator("sub", maths="{0} − {1}", aten=("sub",))
def sub(a: Any, b: Any) -> Any:
    """The difference, written a - b outside patterns."""
    return a - b


@operator("mul", commutative=True, maths="{0} ⊙ {1}", aten=("mul",))
def mul(a: Any, b: Any) -> Any:
    """The elementwise product, written a * b outside patterns."""
    return a * b


@operator("div", maths="{0} / {1}", aten=("div",))
def div(a: Any, b: Any) -> Any:
    """The elementwise quotient, written a / b outside patterns."""
    return a / b


@operator("pow", maths="{0}^{1}", aten=("pow",))
def power(a: Any, b: Any) -> Any:
    """The elementwise power, written a ** b outside patterns."""
    return a**b


@operator("neg", maths="−{0}", aten=("neg",))
def neg(a: Any) -> Any:
    """The negative, written -a outside patterns."""
    return -a


@operator("max", maths="max({0}, {1})")
def larger(a: Number, b: Number) -> Number:
    """The larger of two numbers."""
    return max(a, b)


@operator("floor", maths="⌊{0}⌋")
def floor(a: Number) -> int:
    """The largest whole number that is not above a."""
    return math.floor(a)


@operator("divisor")
def divisor(n: int, near: int) -> int:
    """The divisor of n that is nearest to ``near``, the smaller one of two."""
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - near), d))


@operator("small_factor")
def small_factor(n: int, most: int) -> int:
    """``most`` if it divides n; else the largest divisor below it and up to √n; -1: up to √n."""
    if most > 0 and n % most == 0:
        return most
    limit = min(math.isqrt(n), most if most > 0 else n)
    return max(d for d in range(1, limit + 1) if n % d == 0)


@operator("matmul", maths="{0}·{1}", aten=("matmul", "mm", "bmm"))
def matmul(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product of the last two dimensions, written a @ b outside patterns."""
    return torch.matmul(a, b)


@operator("linear", maths=("{1}·{0}", "{1}·{0} + {2}"), aten=("linear",))
def linear(x: Tensor, W: Tensor, b: Any = None) -> Tensor:
    """The product x Wᵀ + b over the last dimension; W is (out, in), b is (out,), absent or 0."""
    return F.linear(x, W, None if isinstance(b, int | float) and b == 0 else b)


@operator("embedding", maths="{1}[{0}]", aten=("embedding",))
def embedding(ids: Tensor, W: Tensor) -> Tensor:
    """The rows of W that ``ids`` name."""
    return F.embedding(ids, W)


@operator("take_rows", maths="{0}[{1}]")
def take_rows(W: Tensor, rows: Sequence[int]) -> Tensor:
    """The rows of W with these numbers, in their order."""
    return torch.index_select(W, 0, _numbers(W, rows))


@operator("put_rows", maths="{0}[{1} ← {2}]")
def put_rows(W: Tensor, rows: Sequence[int], values: Tensor) -> Tensor:
    """W with ``values`` in place of the rows with these numbers, of which none is there twice."""
    return torch.index_copy(W, 0, _numbers(W, rows), values.to(W.dtype))


def _numbers(W: Tensor, rows: Sequence[int]) -> Tensor:
    """The numbers of rows as a tensor beside W. ValueError for what is no row, or named twice."""
    count = W.shape[0] if isinstance(W.shape[0], int) else math.inf  # a graph's may be a node
    odd = [row for row in rows if type(row) is not int or not 0 <= row < count]
    if odd or len({*rows}) < len(rows):
        what = f"{odd[0]!r} is the number of no row" if odd else "a row is named twice"
        raise ValueError(what)
    return torch.tensor(rows, dtype=torch.long, device=W.device)


@operator("conv2d", maths="{1} ∗ {0}", aten=("convolution", "conv2d"))
def conv2d(
    x: Tensor,
    W: Tensor,
    b: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """Two-dimensional convolution; W is (out, in // groups, height, width)."""
    bias = None if isinstance(b, int | float) and b == 0 else b
    return F.conv2d(x, W, bias, stride, padding, dilation, groups)


@operator("dropout", maths=("{0}", "drop({0})"))
def dropout(x: Tensor, p: float, *, training: Any = False) -> Tensor:
    """While training, zero each element with probability p and scale the rest by 1 / (1 - p)."""
    return x if isinstance(p, int | float) and p == 0 else F.dropout(x, p, training)


@operator("layer_norm", aten=("layer_norm", "native_layer_norm"))
def layer_norm(x: Tensor, W: Any = None, b: Any = None, eps: float = 1e-5) -> Tensor:
    """Normalise the last dimension to mean 0 and variance 1, then scale by W and shift by b."""
    bias = None if isinstance(b, int | float) and b == 0 else b
    return F.layer_norm(x, (x.shape[-1],), W, bias, eps)


@operator("relu", maths="relu({0})", aten=("relu",))
def relu(x: Tensor) -> Tensor:
    """max(x, 0)."""
    return F.relu(x)


@operator("silu", maths="silu({0})", aten=("silu",))
def silu(x: Tensor) -> Tensor:
    """The product x σ(x), also called swish."""
    return F.silu(x)


@operator("gelu", maths="gelu({0})", aten=("gelu",))
def gelu(x: Tensor) -> Tensor:
    """The product x Φ(x), by the error function."""
    return F.gelu(x)


@operator("tanh", maths="tanh({0})", aten=("tanh",))
def tanh(x: Tensor) -> Tensor:
    """The hyperbolic tangent."""
    return torch.tanh(x)


@operator("sigmoid", maths="σ({0})", aten=("sigmoid",))
def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x)."""
    return torch.sigmoid(x)


@operator("softmax", aten=("softmax", "_softmax"))
def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """e^x normalised to sum 1 over ``dim``."""
    return torch.softmax(x, dim)


@operator("exp", maths="exp({0})", aten=("exp",))
def exp(x: Any) -> Any:
    """e^x, of a tensor or a number."""
    return math.exp(x) if isinstance(x, int | float) else torch.exp(x)


@operator("log", maths="log({0})", aten=("log",))
def log(x: Any) -> Any:
    """The natural logarithm, of a tensor or a number."""
    return math.log(x) if isinstance(x, int | float) else torch.log(x)


@operator("sqrt", maths="√{0}", aten=("sqrt",))
def sqrt(x: Any) -> Any:
    """The square root, of a tensor or a number."""
    return math.sqrt(x) if isinstance(x, int | float) else torch.sqrt(x)


@operator("abs", maths="|{0}|", aten=("abs",))
def absolute(x: Any) -> Any:
    """The absolute value, of a tensor or a number."""
    return abs(x)


@operator("mean", aten=("mean",))
def mean(x: Tensor, dim: Dimensions, keepdim: bool = False) -> Tensor:
    """The mean over ``dim``, one dimension or several."""
    return torch.mean(x, dim, keepdim)


@operator("sum", aten=("sum",))
def total(x: Tensor, dim: Dimensions, keepdim: bool = False) -> Tensor:
    """The sum over ``dim``, one dimension or several."""
    return torch.sum(x, dim, keepdim)


@operator("norm", maths="‖{0}‖", aten=("linalg_vector_norm",))
def norm(x: Tensor, dim: Dimensions, keepdim: bool = False) -> Tensor:
    """The Euclidean norm over ``dim``; over two dimensions, the Frobenius norm of a matrix."""
    length: Tensor = torch.linalg.vector_norm(x, dim=dim, keepdim=keepdim)
    return length


@operator("detach", maths="{0}", aten=("detach",))
def detach(x: Tensor) -> Tensor:
    """The same value, through which no gradient flows."""
    return x.detach()


@operator("transpose", maths="{0}ᵀ", aten=("transpose", "t"))
def transpose(x: Tensor, first: int = -2, second: int = -1) -> Tensor:
    """Two dimensions exchanged; the last two unless told otherwise."""
    return torch.transpose(x, first, second)


@operator("reshape", maths="{0}", aten=("reshape", "view", "_unsafe_view"))
def reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The same elements in another shape; one size may be -1."""
    return torch.reshape(x, tuple(shape))


@operator("size", maths="size({0}, {1})")
def size(x: Tensor, dim: int) -> int:
    """How many entries x has along ``dim``."""
    return x.shape[dim]


@operator("view_as", maths="{0}")
def view_as(x: Tensor, other: Tensor) -> Tensor:
    """The elements of x in the shape of ``other``."""
    return torch.reshape(x, other.shape)


@operator("concat", aten=("cat",))
def concat(a: Tensor, b: Tensor, dim: int = -1) -> Tensor:
    """Two tensors one after the other along ``dim``."""
    return torch.cat((a, b), dim)


@operator("choose", maths="{1}")
def choose(flag: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The elements of a where ``flag`` is above 0, and those of b elsewhere."""
    return torch.where(flag > 0, a, b)


@operator("zeros_like", maths="0", aten=("zeros_like",))
def zeros_like(x: Tensor) -> Tensor:
    """Zeros of the shape and dtype of x."""
    return torch.zeros_like(x)


@operator("ones_like", maths="1", aten=("ones_like",))
def ones_like(x: Tensor) -> Tensor:
    """Ones of the shape and dtype of x."""
    return torch.ones_like(x)


@operator("eye_like", maths="I")
def eye_like(x: Tensor) -> Tensor:
    """The identity matrix of the size and dtype of x, which is square."""
    return torch.diag_embed(torch.ones_like(torch.diagonal(x, 0, -2, -1)))


@operator("skew")
def skew(v: Tensor, n: int) -> Tensor:
    """The (n, n) matrix with S = -Sᵀ whose entries above the diagonal, row by row, are v."""
    i = torch.arange(n, device=v.device)
    low, high = torch.minimum(i[:, None], i), torch.maximum(i[:, None], i)
    places = torch.clamp(low * (2 * n - low - 1) // 2 + high - low - 1, min=0)
    entries = torch.index_select(v, -1, places.reshape(-1))
    whole: Tensor = entries.unflatten(-1, (n, n)) * torch.sign(i - i[:, None])
    return whole


@operator("svd")
def svd(W: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vᵀ of the largest ``rank`` singular values: W ≈ (U * S) @ Vᵀ, S in falling order."""
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    return U[:, :rank], S[:rank], V[:rank]


@operator("qr")
def qr(W: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """The first ``rank`` columns of Q and rows of R, where W = Q @ R and Qᵀ @ Q = I."""
    Q, R = torch.linalg.qr(W)
    return Q[:, :rank], R[:rank]


@operator("count")
def count(items: Sequence[Any]) -> int:
    """How many items a list has."""
    return len(items)


@operator("lstm")
def lstm(x: Tensor, Wi: Tensor, Wh: Tensor, bi: Tensor, bh: Tensor, *, training: Any) -> Tensor:
    """A bidirectional layer of long short-term memory over a sequence x (steps, in).

    Gives (steps, 2 * hidden). The first dimension of each weight is the direction: Wi is (2,
    4 * hidden, in), Wh (2, 4 * hidden, hidden), bi and bh (2, 4 * hidden); gates are in torch's
    order: input, forget, cell, output.
    """
    start = x.new_zeros((2, 1, Wh.shape[-1]))
    weights = [weight[direction] for direction in (0, 1) for weight in (Wi, Wh, bi, bh)]
    both = torch.ops.aten.lstm.input(
        x.unsqueeze(1), [start, start], weights, True, 1, 0.0, training, True, False
    )
    steps: Tensor = both[0].squeeze(1)
    return steps
