"""Modules translated into ONNX, by transformers' exporter or by torch's, without their chatter."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from peftsurgery.capture.export import EXPORT_ERRORS
from peftsurgery.capture.prepared import without_fast_path
from peftsurgery.errors import SurgeryError, first_line


def translate(module: nn.Module, inputs: dict[str, Any], shapes: dict[str, Any]) -> Any:
    """The module as an onnx_ir.Model of these example inputs. PSG412 if it has no translation.

    ``shapes`` are the sizes that may vary, as ``torch.export`` takes them.
    """
    try:
        with silence(), without_fast_path():
            return (
                _by_transformers(module, inputs, shapes)
                if isinstance(module, PreTrainedModel)
                else _by_torch(module, inputs, shapes)
            )
    except EXPORT_ERRORS as error:
        raise SurgeryError(
            "PSG412", f"{type(module).__name__} cannot be written as ONNX: {_reason(error)}"
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
    from transformers.exporters import exporter_onnx

    # what its models call that torch.onnx does not know: the products of experts, for one
    theirs = getattr(exporter_onnx, "_ONNX_TRANSLATION_TABLE", None)
    program = torch.onnx.export(
        plain,
        kwargs=inputs,
        dynamic_shapes=shapes,
        custom_translation_table=theirs,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    return program.model


def in_full_precision(plain: nn.Module) -> nn.Module:
    """The model with weights of half precision cast to fp32; the model itself if it has none."""
    small = any(t.is_floating_point() and t.itemsize < 4 for t in plain.state_dict().values())
    return copy.deepcopy(plain).float() if small else plain


def in_dtype_of(whole: nn.Module, plain: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of a model, as the same model takes them :func:`in_full_precision`."""
    if whole is plain:
        return inputs
    small = {n: v for n, v in inputs.items() if v.is_floating_point() and v.itemsize < 4}
    return {**inputs, **{name: value.float() for name, value in small.items()}}


@contextlib.contextmanager
def without_cache(plain: nn.Module) -> Iterator[None]:
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
