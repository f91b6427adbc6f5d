"""Specimens: what a match binds, made of random numbers, so that rules can be tried on no model.

Each kind of site has an operation, its plain torch definition, and a few sizes. All numbers are
double precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftsurgery.language.kinds import KINDS

_PER_TOKEN = ("mask", "positions", "types", "labels")

Operation = Callable[[Mapping[str, Any]], Tensor]


@dataclass(frozen=True, eq=False)
class Specimen:
    """Bindings of a match, and the operation that computes its result from them.

    ``operation`` is None where the result is not a function of the bindings alone.
    """

    title: str
    bindings: Mapping[str, Any]
    operation: Operation | None


def specimens(kind: str, generator: torch.Generator) -> Iterator[Specimen]:
    """Specimens of a kind in several sizes, with and without a bias. None for patterns."""
    maker = _MAKERS.get(kind)
    if maker is not None:
        yield from maker(generator)


def _linears(generator: torch.Generator) -> Iterator[Specimen]:
    for lead, width, rows, biased in (
        ((2, 3), 18, 14, True),
        ((4,), 13, 20, False),
        ((1,), 16, 16, True),
    ):
        given = {
            "x": _random(generator, *lead, width),
            "W": _random(generator, rows, width),
            "b": _random(generator, rows) if biased else 0.0,
            "in": width,
            "out": rows,
        }
        yield _specimen(f"in {width}, out {rows}, {_bias(biased)}", given, _linear)


def _linear(env: Mapping[str, Any]) -> Tensor:
    x, W, b = env["x"], env["W"], env["b"]
    return torch.add(torch.matmul(x, W.transpose(-2, -1)), b)


def _experts(generator: torch.Generator) -> Iterator[Specimen]:
    for count, width, rows in ((3, 8, 6), (2, 4, 10)):
        given = {
            "x": _random(generator, count, 5, width),
            "W": _random(generator, count, rows, width),
            "in": width,
            "out": rows,
            "experts": count,
            "b": 0.0,
        }
        yield _specimen(f"in {width}, out {rows}, {count} experts", given, _linear)


def _embeddings(generator: torch.Generator) -> Iterator[Specimen]:
    for count, width in ((11, 6), (5, 16)):
        given = {
            "x": torch.randint(count, (2, 7), generator=generator),
            "W": _random(generator, count, width),
            "in": count,
            "out": width,
        }
        yield _specimen(f"in {count}, out {width}", given, lambda env: env["W"][env["x"]])


def _convs(generator: torch.Generator) -> Iterator[Specimen]:
    for groups, stride, padding, dilation, kernel, biased in (
        (1, (1, 1), (1, 1), (1, 1), (3, 3), True),
        (1, (2, 1), (0, 2), (1, 2), (3, 2), False),
        (2, (2, 2), (1, 1), (1, 1), (3, 3), True),
    ):
        width, rows = 4, 6
        given = {
            "x": _random(generator, 2, width, 9, 8),
            "W": _random(generator, rows, width // groups, *kernel),
            "b": _random(generator, rows) if biased else 0.0,
            "in": width,
            "out": rows,
            "kernel": kernel,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
        }
        yield _specimen(f"kernel {kernel}, {groups} groups, {_bias(biased)}", given, _conv)


def _conv(env: Mapping[str, Any]) -> Tensor:
    bias = env["b"] if isinstance(env["b"], Tensor) else None
    places = (env[name] for name in ("stride", "padding", "dilation", "groups"))
    return F.conv2d(env["x"], env["W"], bias, *places)


# More than the rules that put tokens of their own in the place of others take away.
TOKENS = 12


def _norms(generator: torch.Generator) -> Iterator[Specimen]:
    for width, biased in ((8, True), (6, False)):
        given = {
            "x": _random(generator, 2, TOKENS, width),
            "W": _random(generator, width),
            "b": _random(generator, width) if biased else 0.0,
            "hidden": width,
        }
        yield _specimen(f"hidden {width}, {_bias(biased)}", given, _norm)


def _norm(env: Mapping[str, Any]) -> Tensor:
    x: Tensor = env["x"]
    level = (x - x.mean(-1, True)) / x.std(-1, keepdim=True)
    return torch.add(level * env["W"], env["b"])


def _attentions(generator: torch.Generator) -> Iterator[Specimen]:
    for heads, kv_heads, width, masked in ((4, 4, 8, False), (4, 2, 6, True)):
        queries = _random(generator, 2, heads, 5, width)
        keys = _random(generator, 2, kv_heads, 5, width)
        given = {
            "x": _random(generator, 2, 5, heads * width),
            "q": queries,
            "k": keys,
            "v": _random(generator, 2, kv_heads, 5, width),
            "mask": _random(generator, 2, 1, 5, 5) if masked else None,
            "o": torch.zeros_like(queries),
            "heads": heads,
            "kv_heads": kv_heads,
            "layer": 0,
            "head_dim": width,
            "hidden": heads * width,
        }
        title = f"{heads} heads, {kv_heads} kv heads, {'a' if masked else 'no'} mask"
        yield Specimen(title, given, None)


def _residuals(generator: torch.Generator) -> Iterator[Specimen]:
    for width in (8, 6):
        given = {name: _random(generator, 2, 3, width) for name in ("h", "x", "y")}
        yield Specimen(f"hidden {width}", {**given, "hidden": width}, None)


def _inputs(generator: torch.Generator) -> Iterator[Specimen]:
    for width, rows, length, given in ((8, 11, 5, True), (6, 7, 9, False)):
        sequence = torch.ones(2, length, dtype=torch.long)
        bound: dict[str, Any] = dict.fromkeys(KINDS["inputs"].values)
        for prefix in ("", "decoder_"):
            bound[f"{prefix}embeds"] = _random(generator, 2, length, width)
            bound |= {f"{prefix}{name}": sequence for name in _PER_TOKEN if given}
        bound["answer"] = sequence[:, 0] if given else None
        # as many texts as any small number of prompts is a divisor of
        bound |= {"logits": _random(generator, 840, 3), "W": _random(generator, rows, width)}
        bound |= {"width": width, "vocabulary": rows}
        title = f"width {width}, {'with' if given else 'without'} a mask and labels"
        yield Specimen(title, bound, None)


def _positions(generator: torch.Generator) -> Iterator[Specimen]:
    for lead in ((), (2,)):
        p = torch.arange(5).expand(*lead, 5)
        given = {"p": p, "y": _random(generator, *p.shape, 6)}
        yield Specimen(f"{p.dim()} dimensions", given, None)


def _specimen(title: str, given: Mapping[str, Any], operation: Operation) -> Specimen:
    return Specimen(title, {**given, "y": operation(given)}, operation)


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _bias(biased: bool) -> str:
    return "with a bias" if biased else "without a bias"


_MAKERS: Mapping[str, Callable[[torch.Generator], Iterator[Specimen]]] = {
    "linear": _linears,
    "experts": _experts,
    "embedding": _embeddings,
    "conv": _convs,
    "norm": _norms,
    "attention": _attentions,
    "residual": _residuals,
    "inputs": _inputs,
    "positions": _positions,
}
