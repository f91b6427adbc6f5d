"""Models written as ONNX: folded, or with the tensors of their adapters as inputs.

transformers models go through transformers' own exporter, other modules through torch.onnx. A file
is run in onnxruntime at two shapes that the export had not seen before it gets its name. A model
stored in half precision is written in fp32 with the same values: onnxruntime has few kernels for
bf16 on a CPU, so a file in bf16 could not be checked.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedModel

from peftsurgery.arguments import checked
from peftsurgery.capture import GraphModel
from peftsurgery.capture.export import EXPORT_ERRORS, without_fast_path
from peftsurgery.errors import SurgeryError, first_line
from peftsurgery.formats.onnx.file import OnnxFile, name_sizes, write_checked
from peftsurgery.formats.onnx.runtime import check_outputs, need_onnx
from peftsurgery.formats.trial_inputs import (
    Inputs,
    free_axes,
    output_tensors,
    seen_inputs,
    unseen_inputs,
)
from peftsurgery.surgery.fold.folding import fold


@checked
def export_onnx(model: GraphModel, path: str | Path, adapters: str = "fold") -> OnnxFile:
    """Write a captured or operated model as ONNX, with its operations folded into the weights.

    Batch and sequence may vary. A file at ``path`` is replaced, once the new one has been checked.
    Raises what :func:`fold` raises, PSG602 for a place that the model was read from, PSG411 if
    onnxruntime disagrees, PSG412 if the model cannot be written as ONNX, PSG413 for
    ``adapters="inputs"``.
    """
    if adapters != "fold":
        raise SurgeryError("PSG413", f"adapters='{adapters}' is not there", "use adapters='fold'")
    return write_onnx(model, fold(model), Path(path))


def write_onnx(model: GraphModel, plain: nn.Module, path: Path) -> OnnxFile:
    """Write ``plain``, the folded ``model``, to ``path``."""
    need_onnx()
    plain = in_full_precision(plain).eval()

    def outputs(inputs: Inputs) -> dict[str, Tensor]:
        with torch.no_grad(), _without_cache(plain):
            return output_tensors(plain(**inputs))

    def check(file: Path) -> float:
        return check_outputs(file, unseen_inputs(model), outputs)

    dtype = str(next((p.dtype for p in plain.parameters()), torch.float32)).removeprefix("torch.")
    return write_checked(model, path, lambda: _translated(model, plain), check, dtype)


def _translated(model: GraphModel, plain: nn.Module) -> Any:
    """The plain model as an onnx_ir.Model, with named sizes. PSG412 if it has no translation."""
    inputs = seen_inputs(model)
    shapes = {name: dict.fromkeys(axes, Dim.AUTO) for name, axes in free_axes(model).items()}
    with refused_by_code(plain):
        graph = (
            _by_transformers(plain, inputs, shapes)
            if isinstance(plain, PreTrainedModel)
            else _by_torch(plain, inputs, shapes)
        )
    name_sizes(graph, {})
    return graph


@contextlib.contextmanager
def refused_by_code(plain: nn.Module) -> Iterator[None]:
    """PSG412 for what an export raises of a model; its progress and advice are kept quiet."""
    try:
        with silence(), without_fast_path():
            yield
    except EXPORT_ERRORS as error:
        raise SurgeryError(
            "PSG412", f"{type(plain).__name__} cannot be written as ONNX: {_reason(error)}"
        ) from error


def _reason(error: BaseException) -> str:
    """What was first to fail; torch.onnx wraps it in advice about its own debugging."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _by_transformers(plain: PreTrainedModel, inputs: dict[str, Any], shapes: dict[str, Any]) -> Any:
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    config = OnnxConfig(dynamic=True, dynamic_shapes=shapes)
    return OnnxExporter().export(plain, {**inputs, "use_cache": False}, config=config).program


def _by_torch(plain: nn.Module, inputs: dict[str, Any], shapes: dict[str, Any]) -> Any:
    program = torch.onnx.export(
        plain, kwargs=inputs, dynamic_shapes=shapes, dynamo=True, verbose=False
    )
    assert program is not None
    return program.model


def in_full_precision(plain: nn.Module) -> nn.Module:
    """The model with weights of half precision cast to fp32; the model itself if it has none."""
    small = any(t.is_floating_point() and t.itemsize < 4 for t in plain.state_dict().values())
    return copy.deepcopy(plain).float() if small else plain


@contextlib.contextmanager
def _without_cache(plain: nn.Module) -> Iterator[None]:
    """Let a causal model return no cache; the exported one does not either."""
    config: Any = getattr(plain, "config", None)
    before = getattr(config, "use_cache", None)
    if before is None:
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = before


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep the exporters' own progress and advice off both streams; what they raise is enough."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
