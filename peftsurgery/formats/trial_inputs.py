"""Inputs to try a model on, at sizes that its capture has not seen, and how far outputs differ.

Names, dtypes and the sizes that may vary are those of the captured graph; the values are random and
the same every time. Token ids come from the config's vocabulary, and the last row of a mask ends in
padding.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from transformers.utils import ModelOutput

from peftsurgery.anatomy.values import fixed
from peftsurgery.capture import GraphModel
from peftsurgery.capture.loops.running import counts_of_turns
from peftsurgery.capture.sizes import evaluate_sizes, shape_texts
from peftsurgery.errors import SurgeryError

Inputs = dict[str, Tensor]
Tensors = Mapping[str, Tensor]
TOLERANCE = 1e-5
"""How far outputs in fp32 may be from what is expected."""

# Two batches, and what happens to every other size that may vary; the next best follow.
_FIRST, _SECOND = 1, 3
_STRETCHES: tuple[Callable[[int], int], ...] = (
    lambda size: size + 3,
    lambda size: 2 * size,
    lambda size: size,
)


def unseen_inputs(model: GraphModel, unrolled: bool = False) -> list[Inputs]:
    """Inputs at two shapes other than the one the model was captured with.

    With ``unrolled`` they are such that its loops have as many turns as they had there.

    PSG414 if the model takes something else than tensors by name, or allows no other size.
    """
    first = _allowed(model, (_FIRST, _SECOND + 1), _STRETCHES, unrolled)
    second = _allowed(model, (_SECOND,), _STRETCHES[1:], unrolled)
    return [first, second]


def seen_inputs(model: GraphModel) -> Inputs:
    """Inputs at the shape the model was captured with."""
    return _make(model, _placeholders(model), None, _STRETCHES[-1])


def free_axes(model: GraphModel) -> dict[str, list[int]]:
    """The axes of each input whose size may vary."""
    return {
        node.name: [i for i, size in enumerate(node.meta["val"].shape) if fixed(size) is None]
        for node in _placeholders(model)
    }


def output_tensors(outputs: Any) -> dict[str, Tensor]:
    """The tensors of a model's outputs, by the name of the field and their position in it."""
    fields = outputs.items() if isinstance(outputs, ModelOutput) else [("output", outputs)]
    found: dict[str, Tensor] = {}
    for name, value in fields:
        leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
        names = [name] if len(leaves) == 1 else [f"{name}.{i}" for i in range(len(leaves))]
        found.update(zip(names, leaves, strict=True))
    return found


@dataclass(frozen=True)
class Difference:
    """Largest absolute difference of outputs, and the largest absolute expected value."""

    largest: float
    scale: float

    def within(self, tolerance: float) -> bool:
        """Whether the difference is small: absolutely for outputs up to 1, relatively above that.

        The rounding error of a sum grows with the sum; logits of 30 in fp32 are known to 1e-5.
        """
        return self.largest <= tolerance * max(1.0, self.scale)


def difference(expected: Tensors, actual: Tensors) -> Difference:
    """The largest difference over all expected outputs; infinite if one is missing or is NaN."""
    largest = scale = 0.0
    for name, want in expected.items():
        have = actual.get(name)
        if have is None or have.shape != want.shape:
            return Difference(math.inf, scale)
        if not want.numel():
            continue
        wide = want.to(torch.float64)
        gap = float((have.to(torch.float64) - wide).abs().max())
        largest = max(largest, math.inf if math.isnan(gap) else gap)
        scale = max(scale, float(wide.abs().max()))
    return Difference(largest, scale)


def tolerance_of(model: nn.Module) -> tuple[torch.dtype, float]:
    """The dtype that a model computes in, and how far its outputs may be from what is expected.

    1e-5 in fp32. In half precision an operated model adds its adapters in fp32 where a folded one
    has rounded weights, and every layer rounds its activations: some 60 roundings, which add up
    like a random walk to 8 times one of them.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    precision = torch.finfo(dtype).eps
    is_single = precision <= torch.finfo(torch.float32).eps
    return dtype, TOLERANCE if is_single else 8 * precision


def largest_gap(
    cases: Iterable[tuple[Tensors, Tensors, Tensors]], tolerance: float, code: str, whose: str
) -> float:
    """The largest difference of outputs; ``cases`` are inputs, expected and actual outputs.

    An error of this code for one above the tolerance, which says for which inputs, and whose.
    """
    largest = 0.0
    for given, expected, actual in cases:
        gap = difference(expected, actual)
        if not gap.within(tolerance):
            sizes = ", ".join(f"{name} {list(value.shape)}" for name, value in given.items())
            message = f"{whose} outputs for {sizes} differ by {gap.largest:.1e}"
            raise SurgeryError(code, message)
        largest = max(largest, gap.largest)
    return largest


def _allowed(
    model: GraphModel,
    batches: tuple[int, ...],
    stretches: tuple[Callable[[int], int], ...],
    unrolled: bool,
) -> Inputs:
    """Inputs of the first of these sizes that the capture allows."""
    capture, nodes = model.captures[0], _placeholders(model)
    turns = _turns(model, seen_inputs(model)) if unrolled else ()
    for stretch, batch in itertools.product(stretches, batches):
        inputs = _make(model, nodes, batch, stretch)
        fits = capture.fits([inputs[name] for name in capture.names], capture.mode is True)
        if fits and not (unrolled and _turns(model, inputs) != turns):
            return inputs
    raise SurgeryError("PSG414", "the model allows no other sizes than those it was captured with")


def _turns(model: GraphModel, inputs: Inputs) -> tuple[int, ...]:
    """How many turns a model's loops have for some inputs: a file has each turn by itself."""
    capture = model.captures[0]
    programs = [program for each in capture.programs.values() for program in each]
    counts = counts_of_turns(program.graph for program in programs)
    texts = shape_texts(capture.top.graph, counts)
    return evaluate_sizes(capture.names, texts, [inputs[name] for name in capture.names])


def _placeholders(model: GraphModel) -> list[fx.Node]:
    nodes = list(model.captures[0].top.graph.find_nodes(op="placeholder"))
    known = inspect.signature(model.source.module.forward).parameters
    for node in nodes:
        if node.name not in known or not isinstance(node.meta.get("val"), Tensor):
            message = f"no example can be made of '{node.name}', which is not a tensor argument"
            raise SurgeryError("PSG414", message)
    return nodes


def _make(
    model: GraphModel, nodes: list[fx.Node], batch: int | None, stretch: Callable[[int], int]
) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    target = "cpu" if device.type == "meta" else device
    inputs = {}
    for node in nodes:
        shape = list(_shape(node.meta["val"].shape, batch, stretch))
        value = _value(model, node.name, shape, node.meta["val"].dtype, generator)
        inputs[node.name] = value.to(target)
    return inputs


def _shape(sizes: Any, batch: int | None, stretch: Callable[[int], int]) -> Iterator[int]:
    for axis, size in enumerate(sizes):
        known = fixed(size)
        if known is not None:
            yield known
        elif axis == 0 and batch is not None:
            yield batch
        else:
            yield stretch(int(size.node.hint)) if axis else int(size.node.hint)


def _value(
    model: GraphModel, name: str, shape: list[int], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator).to(dtype)
    if "mask" in name or dtype == torch.bool:
        mask = torch.ones(shape, dtype=dtype)
        if mask.ndim == 2 and shape[1] > 2:
            mask[-1, -2:] = 0
        return mask
    if name.endswith("input_ids"):
        return torch.randint(_vocabulary(model), shape, generator=generator, dtype=dtype)
    return torch.zeros(shape, dtype=dtype)


def _vocabulary(model: GraphModel) -> int:
    config: Any = getattr(model.source.module, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "vocab_size", 2))
