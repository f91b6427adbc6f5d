"""Models written as ONNX: folded, or with the tensors of their adapters as inputs.

transformers models go through transformers' own exporter, other modules through torch.onnx. A file
is run in onnxruntime at two shapes that the export had not seen before it gets its name. A model
stored in half precision is written in fp32 with the same values: onnxruntime has few kernels for
bf16 on a CPU, so a file in bf16 could not be checked.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim

from peftsurgery.arguments import checked
from peftsurgery.capture import GraphModel, capture
from peftsurgery.capture.decided import check_undecided
from peftsurgery.formats.onnx.calls import NamedCalls
from peftsurgery.formats.onnx.file import OnnxFile, name_sizes, write_checked
from peftsurgery.formats.onnx.graph import write_graph
from peftsurgery.formats.onnx.runtime import check_outputs, need_onnx
from peftsurgery.formats.onnx.slots import Slots, that_can_be_left_out, with_slots
from peftsurgery.formats.onnx.translate import (
    in_dtype_of,
    in_full_precision,
    translate,
    without_cache,
)
from peftsurgery.formats.trial_inputs import (
    Inputs,
    free_axes,
    output_tensors,
    seen_inputs,
    unseen_inputs,
)
from peftsurgery.surgery.fold.folding import fold
from peftsurgery.surgery.model.shared import unoperated


@checked
def export_onnx(
    model: GraphModel,
    path: str | Path,
    adapters: Literal["fold", "inputs"] = "fold",
    cache: bool = False,
) -> OnnxFile:
    """Write a captured or operated model as ONNX, checked in onnxruntime.

    The active adapters are folded into the weights, or with ``adapters="inputs"`` their tensors are
    inputs, which may be left out (see :mod:`.slots`): :func:`to_ort` writes them as onnxruntime
    takes them. With ``cache``, keys and values of past tokens are inputs and outputs too (see
    :mod:`.calls`). Batch and sequence may vary. A file at ``path`` is replaced, once the new one
    has been checked. Raises what :func:`fold` raises, PSG602 for a place that the model was read
    from, PSG411 if onnxruntime disagrees, PSG412 if the model cannot be written as ONNX, PSG413 if
    an adapter cannot be left out of a graph, PSG210 and PSG212 for models without a plain cache.
    """
    need_onnx()
    if adapters == "inputs" or cache:
        check_undecided((d for c in model.captures for d in c.decisions), "an ONNX file")
    if adapters == "inputs":
        made, slots = with_slots(model)
        calls, without = NamedCalls(made, made, cache), NamedCalls(made, unoperated(made), cache)
        slots = that_can_be_left_out(slots, calls, without)
        return write_graph(model, Path(path), calls, without, slots)
    plain = fold(model)
    if cache:
        plain = in_full_precision(plain).eval()
        folded = capture(plain)
        calls, own = NamedCalls(folded, folded, True), NamedCalls(folded, plain, True)
        return write_graph(model, Path(path), calls, own, Slots())
    return write_onnx(model, plain, Path(path))


def write_onnx(model: GraphModel, plain: nn.Module, path: Path) -> OnnxFile:
    """Write ``plain``, the folded ``model``, to ``path``."""
    need_onnx()
    whole = in_full_precision(plain).eval()
    as_taken = partial(in_dtype_of, whole, plain)

    def outputs(inputs: Inputs) -> dict[str, Tensor]:
        with torch.no_grad(), without_cache(whole):
            return output_tensors(whole(**inputs))

    def check(file: Path) -> float:
        tried = map(as_taken, unseen_inputs(model, unrolled=True))
        return check_outputs(file, [(each, outputs(each)) for each in tried])

    def graph() -> Any:
        """The whole model as an onnx_ir.Model with named sizes."""
        shapes = {name: dict.fromkeys(axes, Dim.AUTO) for name, axes in free_axes(model).items()}
        made = translate(whole, as_taken(seen_inputs(model)), shapes)
        name_sizes(made, {})
        return made

    dtype = str(next((p.dtype for p in whole.parameters()), torch.float32)).removeprefix("torch.")
    return write_checked(model, path, graph, check, dtype)
