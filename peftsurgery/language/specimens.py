"""Specimens: random bindings of each kind of site, to try rules without a model.

Each kind of site has an operation, its plain torch definition, and comes in several variants: with
and without a bias, with grouped queries, with more keys than queries. Each variant has several
sizes, since a rule may be for sizes that a number divides. All numbers are double precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.language.kinds import KINDS
from peftsurgery.language.operators import Operator
from peftsurgery.language.site_functions import sites as site
from peftsurgery.language.site_functions.sites import core, entries

_PER_TOKEN = ("mask", "positions", "types", "labels")

Operation = Callable[[Mapping[str, Any]], Tensor]
Sizes = Mapping[str, int]
Maker = Callable[[torch.Generator, Sizes], "Specimen"]


@dataclass(frozen=True, eq=False)
class Specimen:
    """Bindings of a match, and the operation that computes its result from them.

    ``operation`` is None where the result is not a function of the bindings alone. ``functions``
    are what a rule may call there, where they take less than their plain definitions.
    """

    title: str
    bindings: Mapping[str, Any]
    operation: Operation | None
    functions: Mapping[str, Operator] = field(default_factory=dict)

    def environment(
        self, settings: Mapping[str, Any], params: Mapping[str, Tensor] = MappingProxyType({})
    ) -> dict[str, Any]:
        """What the names of a rule stand for here, with these settings and parameters."""
        return {**settings, **self.bindings, **params}


@dataclass(frozen=True, eq=False)
class Variant:
    """One variant of a kind: what makes specimens of it, and the sizes to try, in order."""

    maker: Maker
    sizes: Sequence[Sizes]

    def specimens(self, generator: torch.Generator) -> Iterator[Specimen]:
        """A specimen of every size."""
        return (self.maker(generator, sizes) for sizes in self.sizes)


def variants(kind: str, wanted: Sizes | None = None) -> tuple[Variant, ...]:
    """The variants of a kind; none for patterns, which only a model has.

    ``wanted`` sizes are those of every specimen of a kind that has them.
    """
    return tuple(
        Variant(maker, _with(sizes, wanted or {})) for maker, sizes in _VARIANTS.get(kind, ())
    )


def check_sizes_wanted(wanted: Mapping[str, Any]) -> None:
    """Refuse sizes that no kind of site has, or that are no whole number above 0. PSG134."""
    known = {name for kind in _VARIANTS.values() for _, sizes in kind for name in sizes[0]}
    for name, size in wanted.items():
        if name not in known:
            raise SurgeryError("PSG134", f"no site has a size '{name}'", did_you_mean(name, known))
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MOST:
            message = f"the size '{name}' cannot be {size!r:.60}"
            raise SurgeryError("PSG134", message, f"it is a whole number from 1 to {MOST}")


MOST = 16384


def _with(sizes: Sequence[Sizes], wanted: Sizes) -> list[Sizes]:
    """The sizes with the wanted ones in place of theirs, each once."""
    made = [{name: wanted.get(name, size) for name, size in each.items()} for each in sizes]
    return [each for number, each in enumerate(made) if each not in made[:number]]


def _pairs(first: str, second: str, *smallest: tuple[int, int]) -> list[Sizes]:
    """Sizes of a matrix: such as nothing divides, then multiples of most that rules divide by."""
    larger = ((48, 32), (64, 96), (240, 360), (128, 192), (512, 256), (840, 1680), (1024, 2048))
    return [{first: one, second: other} for one, other in (*smallest, *larger)]


def _widths(name: str, *smallest: int) -> list[Sizes]:
    return [{name: size} for size in (*smallest, 16, 48, 64, 128, 240, 1024)]


def _linear_site(
    lead: tuple[int, ...], biased: bool, generator: torch.Generator, sizes: Sizes
) -> Specimen:
    width, rows = sizes["in"], sizes["out"]
    drawn = _drawn(generator, x=(*lead, width), W=(rows, width), b=(rows,) if biased else None)
    return _specimen(f"in {width}, out {rows}, {_bias(biased)}", {**drawn, **sizes}, _linear)


def _linear(env: Mapping[str, Any]) -> Tensor:
    x, W, b = env["x"], env["W"], env["b"]
    return torch.add(torch.matmul(x, W.transpose(-2, -1)), b)


def _experts(grouped: bool, biased: bool, generator: torch.Generator, sizes: Sizes) -> Specimen:
    """A batch of rows for each expert, or ``grouped`` rows, of which most experts have none."""
    count, width, rows = sizes["experts"], sizes["in"], sizes["out"]
    bias = (count, rows) if biased else None
    own = [count - 1] * 2 + [0] * 3  # the expert of each row
    lead = (len(own),) if grouped else (count, 5)
    drawn = _drawn(generator, x=(*lead, width), W=(count, rows, width), b=bias)

    def expert_linear(x: Tensor, W: Tensor) -> Tensor:
        return torch.stack([x[row] @ W[expert].mT for row, expert in enumerate(own)])

    def operation(env: Mapping[str, Any]) -> Tensor:
        product = expert_linear if grouped else site.expert_linear
        b = env["b"]
        added = b if not biased else b[own] if grouped else b[:, None]
        return torch.add(product(env["x"], env["W"]), added)

    title = f"in {width}, out {rows}, {count} experts, {_bias(biased)}"
    kept = "in groups" if grouped else "in batches"
    made = _specimen(f"{title}, {kept}", {**drawn, **sizes}, operation)
    return replace(made, functions=entries(expert_linear) if grouped else {})


def _embedding(generator: torch.Generator, sizes: Sizes) -> Specimen:
    count, width = sizes["in"], sizes["out"]
    given = {
        "x": torch.randint(count, (2, 7), generator=generator),
        "W": _random(generator, count, width),
        **sizes,
    }
    return _specimen(f"in {count}, out {width}", given, lambda env: env["W"][env["x"]])


_WINDOW = ("stride", "padding", "dilation", "groups")


def _conv_site(
    kernel: tuple[int, int],
    window: tuple[Any, ...],
    biased: bool,
    generator: torch.Generator,
    sizes: Sizes,
) -> Specimen:
    width, rows, groups = sizes["in"], sizes["out"], window[-1]
    shape = (rows, max(width // groups, 1), *kernel)
    drawn = _drawn(generator, x=(2, width, 9, 8), W=shape, b=(rows,) if biased else None)
    facts = {"kernel": kernel, **dict(zip(_WINDOW, window, strict=True))}
    title = f"in {width}, out {rows}, kernel {kernel}, {groups} groups, {_bias(biased)}"
    return _specimen(title, {**drawn, **sizes, **facts}, _conv)


def _conv(env: Mapping[str, Any]) -> Tensor:
    bias = env["b"] if isinstance(env["b"], Tensor) else None
    window = (env[name] for name in _WINDOW)
    return F.conv2d(env["x"], env["W"], bias, *window)


# More than the rules that put tokens of their own in the place of others take away.
TOKENS = 12


def _norm_site(biased: bool, generator: torch.Generator, sizes: Sizes) -> Specimen:
    width = sizes["hidden"]
    bias = (width,) if biased else None
    drawn = _drawn(generator, x=(2, TOKENS, width), W=(width,), b=bias)
    return _specimen(f"hidden {width}, {_bias(biased)}", {**drawn, **sizes}, _norm)


def _norm(env: Mapping[str, Any]) -> Tensor:
    x: Tensor = env["x"]
    level = (x - x.mean(-1, True)) / x.std(-1, keepdim=True).clamp(min=1e-12)
    return torch.add(level * env["W"], env["b"])


def _attention(masked: bool, more_keys: int, generator: torch.Generator, sizes: Sizes) -> Specimen:
    """A core; ``more_keys`` than queries, as where a text goes on, or attends to another."""
    heads, kv_heads, width = (sizes[name] for name in ("heads", "kv_heads", "head_dim"))
    queries = _random(generator, 2, heads, 5, width)
    keys = _random(generator, 2, kv_heads, 5 + more_keys, width)
    values = _random(generator, 2, kv_heads, 5 + more_keys, sizes["v_head_dim"])
    mask = _random(generator, 2, 1, 5, 5 + more_keys) if masked else None
    given = {
        "x": _random(generator, 2, 5, heads * width),
        "q": queries,
        "k": keys,
        "v": values,
        "mask": mask,
        "o": torch.zeros(2, heads, 5, sizes["v_head_dim"]),
        **sizes,
        "layer": 0,
        "hidden": heads * width,
    }
    title = (
        f"{heads} heads, {kv_heads} kv heads, {'a' if masked else 'no'} mask, "
        f"5 queries, {5 + more_keys} keys"
    )
    return Specimen(title, given, None, core(heads, kv_heads, mask))


def _heads(heads: int, kv_heads: int, *dims: int) -> list[Sizes]:
    known = {"heads": heads, "kv_heads": kv_heads}
    return [{**known, "head_dim": dim, "v_head_dim": dim} for dim in (*dims, 16, 64, 128)]


def _residual(generator: torch.Generator, sizes: Sizes) -> Specimen:
    width = sizes["hidden"]
    drawn = _drawn(generator, h=(2, 3, width), x=(2, 3, width))
    return _specimen(f"hidden {width}", {**drawn, **sizes}, lambda env: env["x"] + env["h"])


def _inputs(length: int, given: bool, generator: torch.Generator, sizes: Sizes) -> Specimen:
    width, rows = sizes["width"], sizes["vocabulary"]
    sequence = torch.ones(2, length, dtype=torch.long)
    bound: dict[str, Any] = dict.fromkeys(KINDS["inputs"].values)
    for prefix in ("", "decoder_"):
        bound[f"{prefix}embeds"] = _random(generator, 2, length, width)
        bound |= {f"{prefix}{name}": sequence for name in _PER_TOKEN if given}
    bound["answer"] = sequence[:, 0] if given else None
    # as many texts as any small number of prompts is a divisor of
    bound |= {"logits": _random(generator, 840, 3), "W": _random(generator, rows, width)}
    title = f"width {width}, {'with' if given else 'without'} a mask and labels"
    return Specimen(title, {**bound, **sizes}, None)


def _positions(lead: tuple[int, ...], generator: torch.Generator, sizes: Sizes) -> Specimen:
    p = torch.arange(5).expand(*lead, 5)
    given = {"p": p, "y": _random(generator, *p.shape, 6)}
    return Specimen(f"{p.dim()} dimensions", given, None)


def _parameter(
    middle: tuple[int, ...] | None, generator: torch.Generator, sizes: Sizes
) -> Specimen:
    """A parameter of dimensions in the ``middle`` of rows and columns; None for a vector."""
    shape = [sizes["rows"], *(middle or ()), sizes["columns"]][0 if middle is not None else 1 :]
    given = {"W": _random(generator, *shape), "rows": shape[0], "columns": shape[-1], "tied": False}
    return Specimen(f"a parameter of shape {shape}", given, lambda env: env["W"])


def _specimen(title: str, given: Mapping[str, Any], operation: Operation) -> Specimen:
    return Specimen(title, {**given, "y": operation(given)}, operation)


def _drawn(generator: torch.Generator, **shapes: tuple[int, ...] | None) -> dict[str, Any]:
    """Random values of these shapes; 0 for what a site is without."""
    return {n: 0.0 if s is None else _random(generator, *s) for n, s in shapes.items()}


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _bias(biased: bool) -> str:
    return "with a bias" if biased else "without a bias"


_SQUARE: list[Sizes] = [{"in": size, "out": size} for size in (16, 48, 64, 240, 256, 840, 1024)]
_EXPERTS: tuple[list[Sizes], ...] = tuple(
    [{"experts": count, **sizes} for sizes in _pairs("in", "out", smallest)[:-2]]
    for count, smallest in ((3, (8, 6)), (2, (4, 10)))
)
_CONVS: list[Sizes] = _pairs("in", "out", (4, 6))[:5]

_VARIANTS: Mapping[str, tuple[tuple[Maker, Sequence[Sizes]], ...]] = {
    "linear": (
        (partial(_linear_site, (2, 3), True), _pairs("in", "out", (18, 14))),
        (partial(_linear_site, (4,), False), _pairs("in", "out", (13, 20))),
        (partial(_linear_site, (1,), True), _SQUARE),
    ),
    "experts": tuple(
        (partial(_experts, grouped, biased), sizes)
        for (grouped, biased), sizes in zip(((False, False), (True, True)), _EXPERTS, strict=True)
    ),
    "embedding": (
        (_embedding, _pairs("in", "out", (11, 6))),
        (_embedding, _pairs("in", "out", (5, 16))),
    ),
    "conv": (
        (partial(_conv_site, (3, 3), ((1, 1), (1, 1), (1, 1), 1), True), _CONVS),
        (partial(_conv_site, (3, 2), ((2, 1), (0, 2), (1, 2), 1), False), _CONVS),
        (partial(_conv_site, (3, 3), ((2, 2), (1, 1), (1, 1), 2), True), _CONVS),
    ),
    "norm": (
        (partial(_norm_site, True), _widths("hidden", 8)),
        (partial(_norm_site, False), _widths("hidden", 6)),
    ),
    "attention": (
        (partial(_attention, False, 0), _heads(4, 4, 8)),
        (partial(_attention, True, 0), _heads(4, 4, 8)),
        (partial(_attention, True, 2), _heads(4, 2, 6)),
        (partial(_attention, False, 2), _heads(6, 2, 8)),
    ),
    "residual": ((_residual, _widths("hidden", 8)), (_residual, _widths("hidden", 6))),
    "inputs": (
        (partial(_inputs, 5, True), _pairs("width", "vocabulary", (8, 11))[:3]),
        (partial(_inputs, 9, False), _pairs("width", "vocabulary", (6, 7))[:3]),
    ),
    "positions": ((partial(_positions, ()), [{}]), (partial(_positions, (2,)), [{}])),
    "parameter": (
        (partial(_parameter, ()), _pairs("rows", "columns", (7, 5))),
        (partial(_parameter, None), _pairs("rows", "columns", (7, 5))),
        (partial(_parameter, (3,)), _pairs("rows", "columns", (4, 6))[:4]),
    ),
}
