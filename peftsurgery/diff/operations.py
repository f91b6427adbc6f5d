"""count_operations: what a graph does, counted by kinds that torch and ONNX have in common.

The two libraries cut the same mathematics into other operators: an attention core is one node here
and a product, a softmax and a product there; a norm, a gelu, a silu likewise. So what is counted
are the parts that no translation changes, module by module:

    products, convolutions, recurrences, embeddings    one each
    attention cores                                    one node, or a softmax between two products
    norms                                              one node, or a root of a mean
    activations                                        the curve in them: relu, erf, tanh, sigmoid
    sums and products of two streams                   residuals and gates

A stream is what a product, a convolution, an attention core, an embedding or an input makes, and
all that is made of it alone. A batch norm behind a convolution is part of it, since exporters fold
it. Masks, positions, indices, casts, reshapes, constants and dropout are cut and folded as each
exporter likes, and are not counted; nor is what is inside loops and branches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from peftsurgery.diff.description import Node
from peftsurgery.reach import reach

Nodes = Mapping[str, Node]
Counts = dict[str, Counter[str]]
Entry = tuple[str, str, str, str]

LEFT_OUT = "masks, positions, casts, reshapes, dropout, what loops and branches hold"
PRODUCT, CONV, CORE, NORM = "matrix product", "convolution", "attention core", "norm"
SUM, GATE = "sum of two streams", "product of two streams"
_SOFTMAX, _EMBEDDING, _BATCH = "softmax", "embedding", "batch norm"

_ROWS: Mapping[str, tuple[str, ...]] = {
    "linear addmm mm bmm baddbmm matmul einsum": (PRODUCT,),
    "gemm fusedgemm fusedmatmul matmulinteger matmulnbits qlinearmatmul": (PRODUCT,),
    "groupedmm groupedmmfallback": ("grouped product",),
    "conv1d conv2d conv3d convolution conv qlinearconv convinteger": (CONV,),
    "convtranspose1d convtranspose2d convtranspose3d convtranspose": (f"transposed {CONV}",),
    "lstm gru rnn rnntanh rnnrelu": ("recurrence",),
    "scaleddotproductattention attention multiheadattention groupqueryattention": (CORE,),
    "layernorm rmsnorm groupnorm instancenorm": (NORM,),
    "layernormalization rmsnormalization groupnormalization": (NORM,),
    "instancenormalization simplifiedlayernormalization": (NORM,),
    "skiplayernormalization skipsimplifiedlayernormalization": (NORM, SUM),
    "batchnorm batchnormalization": (_BATCH,),
    "embedding embeddingbag": (_EMBEDDING,),
    "softmax": (_SOFTMAX,),
    "erf gelu biasgelu": ("erf",),
    "tanh fastgelu": ("tanh",),
    "sigmoid silu swish quickgelu": ("sigmoid",),
    **{name: (name,) for name in ("relu", "elu", "selu", "celu", "mish", "softplus", "softsign")},
    **{name: (name,) for name in ("leakyrelu", "prelu", "hardsigmoid", "hardswish")},
}
KINDS: Mapping[str, tuple[str, ...]] = {
    name: row for names, row in _ROWS.items() for name in names.split()
}
"""What an operator counts as, by its name in small letters without underscores."""
_STARTS = {PRODUCT, "grouped product", CONV, f"transposed {CONV}", "recurrence", CORE, _EMBEDDING}
_SUMS, _GATES = ("add", "sub"), ("mul", "div")
_ROOTS, _MEANS = ("rsqrt", "sqrt"), ("mean", "reducemean", "var", "varmean")
_ADDED = ("add", "mul", "clamp", "clampmin", "max", "clip", "cast", "to", "getitem")
# What may be between a softmax and the product with the values.
_CARRIED = {
    *(
        "softmax",
        "dropout",
        "cast",
        "to",
        "tocopy",
        "typeas",
        "where",
        "isnan",
        "identity",
        "clone",
    ),
    *("view", "reshape", "unsafeview", "expand", "transpose", "permute", "contiguous", "slice"),
    *("squeeze", "unsqueeze"),
}
_SIZES = ("shape", "size", "symsize", "deviceof")


def count_operations(nodes: Nodes) -> Counts:
    """How often each module does what, by its path; operands stand before what they make."""
    return _CountedGraph(nodes).counts()


class _CountedGraph:
    """One graph, with the readers and the stream of every node."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self.kinds = {key: _kinds(node, nodes) for key, node in nodes.items()}
        self.readers: dict[str, list[str]] = {key: [] for key in nodes}
        self.streams: dict[str, str | None] = {}
        self.made_of: dict[str, set[str]] = {}
        for key, node in nodes.items():
            for operand in dict.fromkeys(node.operands):
                self.readers[operand].append(key)
            self._place(key)

    def _place(self, key: str) -> None:
        """Know the stream of a node, and the streams that it is made of."""
        node = self.nodes[key]
        made_of = {s for operand in node.operands if (s := self.streams[operand]) is not None}
        self.made_of[key] = made_of
        if _name(node) in _SIZES:
            self.streams[key] = None
        elif self._is_apart(key) or len(made_of) > 1 or _is_float_input(node):
            self.streams[key] = key
        else:
            self.streams[key] = next(iter(made_of), None)

    def counts(self) -> Counts:
        """How often each module does what."""
        found: Counts = {}
        cores = dict(self._cores())
        inner = {key for between in cores.values() for key in between}
        for key, node in self.nodes.items():
            kinds = (CORE,) if key in cores else () if key in inner else self._counted(key)
            found.setdefault(node.module, Counter()).update(kinds)
        return {path: +counted for path, counted in found.items() if counted}

    def _counted(self, key: str) -> tuple[str, ...]:
        """What a node counts as that is in no core."""
        node, name, kinds = self.nodes[key], _name(self.nodes[key]), self.kinds[key]
        if name in _ROOTS and self._is_of_mean(node):
            return (NORM,)
        if name in (*_SUMS, *_GATES) and len(self.made_of[key]) > 1:
            return (SUM if name in _SUMS else GATE,)
        if kinds == (CONV,) and any(self.kinds[each] == (_BATCH,) for each in self.readers[key]):
            return ()
        if kinds == (_BATCH,):
            return (CONV if self.kinds[node.operands[0]] == (CONV,) else NORM,)
        return kinds

    def _is_of_mean(self, node: Node) -> bool:
        """Whether a root is one of a mean, but for what is added to it."""
        before = [self.nodes[operand] for operand in node.operands]
        return any(
            _name(each) in _MEANS or (_name(each) in _ADDED and self._is_of_mean(each))
            for each in before
        )

    def _cores(self) -> Iterator[tuple[str, set[str]]]:
        """Every softmax between two products, with these and all that is between."""
        for key, kinds in self.kinds.items():
            if kinds != (_SOFTMAX,):
                continue
            before = set(reach([key], lambda each: self.nodes[each].operands, self._is_apart))
            after = set(reach([key], self.readers.__getitem__, self._is_no_carrier))
            after = {e for e in after if not self._is_no_carrier(e) or self._is_product(e)}
            if all(sum(map(self._is_product, side)) == 1 for side in (before, after)):
                yield (
                    key,
                    {e for e in before | after if self._is_product(e) or not self._is_apart(e)},
                )

    def _is_product(self, key: str) -> bool:
        return self.kinds[key] == (PRODUCT,)

    def _is_no_carrier(self, key: str) -> bool:
        return _name(self.nodes[key]) not in _CARRIED

    def _is_apart(self, key: str) -> bool:
        """Whether a node's value is not made of the streams that it takes."""
        return bool(_STARTS.intersection(self.kinds[key])) or _name(self.nodes[key]) in _SIZES


def _kinds(node: Node, nodes: Nodes) -> tuple[str, ...]:
    name = _name(node)
    if name == "gather" and nodes[node.operands[0]].op == "read":
        return (_EMBEDDING,)
    if name == "gelu" and "tanh" in node.form:
        return ("tanh",)
    return KINDS.get(name, ())


def _is_float_input(node: Node) -> bool:
    return node.op == "input" and "float" in node.shape


def _name(node: Node) -> str:
    """An operator's name as the table has it: ``relu_`` and ``com.microsoft.Relu`` are one."""
    return node.op.rpartition(".")[2].replace("_", "").lower()


def operation_entries(a: Counts, b: Counts) -> Iterator[Entry]:
    """(part, sign, module, text) for every module that does something more or less often in ``b``.

    What is noted at a module further out than it came from is no difference; where ``b`` notes no
    modules at all, the whole models are compared.
    """
    if not any(a) or not any(b):
        a, b = ({"": sum(each.values(), Counter[str]())} for each in (a, b))
    none = Counter[str]()
    apart = {path: Counter(b.get(path, none)) for path in {**a, **b}}
    for path, counted in apart.items():
        counted.subtract(a.get(path, none))
    for path in sorted(apart, key=lambda each: -each.count(".")):
        for outer in _outer(path):
            _settle(apart[path], apart.get(outer, none))
    for path, counted in apart.items():
        said = [
            f"{kind} {a.get(path, none)[kind]} → {a.get(path, none)[kind] + more}"
            for kind, more in sorted(counted.items())
            if more
        ]
        if said:
            yield "graph", "~", path, ", ".join(said)


def _outer(path: str) -> Iterator[str]:
    while path:
        path = path.rpartition(".")[0]
        yield path


def _settle(inner: Counter[str], outer: Counter[str]) -> None:
    """Take from both what one has too many of and the other too few."""
    for kind, more in inner.items():
        if more * outer[kind] < 0:
            moved = min(abs(more), abs(outer[kind])) * (1 if more > 0 else -1)
            inner[kind] -= moved
            outer[kind] += moved
