"""ONNX files: the folded model for runtimes without Python, checked before it gets its name.

transformers models go through transformers' own exporter, other modules through torch.onnx. The
file is written beside its name, run in onnxruntime at two shapes that the export had not seen, and
renamed when its outputs are the folded model's. A model stored in half precision is written in
fp32 with the same values: onnxruntime has few kernels for bf16 on a CPU, so a file in bf16 could
not be checked.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
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
from peftsurgery.formats.trial_inputs import (
    Difference,
    difference,
    free_axes,
    output_tensors,
    seen_inputs,
    unseen_inputs,
)
from peftsurgery.surgery.fold.folding import fold
from peftsurgery.surgery.model.fold_record import FILE, as_json, fold_record
from peftsurgery.surgery.model.operated import active_operations
from peftsurgery.surgery.model.writable import check_places

TOLERANCE = 1e-5
# protobuf ends at 2 GiB; the graph itself needs some of it
LARGEST_FILE = 2**31 - 2**27


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file that was written, and how far onnxruntime is from torch.

    ``data`` is the file of its weights if they are beside it; ``inputs`` have the sizes that may
    vary by name.
    """

    path: str
    data: str | None
    inputs: dict[str, tuple[int | str, ...]]
    outputs: tuple[str, ...]
    difference: float
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """The file as ``--json`` describes it."""
        return asdict(self)

    def moved(self, path: str) -> OnnxFile:
        """The same file under another name of its directory."""
        data = None if self.data is None else str(Path(path).with_name(Path(self.data).name))
        return replace(self, path=path, data=data)

    def __str__(self) -> str:
        beside = f" and {Path(self.data).name}" if self.data else ""
        return (
            f"ONNX in {self.path}{beside} ({self.dtype}): onnxruntime is {self.difference:.1e} "
            "from torch at two unseen shapes"
        )


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
    check_places(model, path, _data_of(path))
    plain = _in_full_precision(plain).eval()
    if path.is_dir():
        raise SurgeryError("PSG603", f"'{path}' is a directory", "name a file: model.onnx")
    folder = path.absolute().with_name(f".{path.name}.part-{os.getpid()}")
    if not folder.parent.is_dir():
        raise SurgeryError("PSG603", f"'{path.parent}' is not a directory", "make it first")
    folder.mkdir()
    try:
        graph = _export(model, plain)
        record = fold_record(model.source, active_operations(model))
        graph.metadata_props[FILE] = as_json(record).decode()
        part = folder / path.name
        data = _save(graph, part)
        apart = check_onnx(model, plain, part)
        if data is not None:
            data.replace(path.with_name(data.name))
        part.replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return OnnxFile(
        str(path),
        None if data is None else str(path.with_name(data.name)),
        {value.name: tuple(_size(size) for size in value.shape) for value in graph.graph.inputs},
        tuple(value.name for value in graph.graph.outputs),
        apart,
        str(next((p.dtype for p in plain.parameters()), torch.float32)).removeprefix("torch."),
    )


def check_onnx(model: GraphModel, plain: nn.Module, file: Path) -> float:
    """Run a file in onnxruntime at two unseen shapes; the largest difference from ``plain``.

    PSG411 if it is above the tolerance, or if the file cannot be run.
    """
    largest = 0.0
    session = _session(file)
    for inputs in unseen_inputs(model):
        with torch.no_grad(), _without_cache(plain):
            wanted = output_tensors(plain(**inputs))
        gap = _compare(session, inputs, wanted)
        if not gap.within(TOLERANCE):
            sizes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
            raise SurgeryError(
                "PSG411", f"onnxruntime's outputs for {sizes} differ by {gap.largest:.1e}"
            )
        largest = max(largest, gap.largest)
    return largest


def _compare(
    session: Any, inputs: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> Difference:
    fed = {value.name: inputs[value.name].cpu().numpy() for value in session.get_inputs()}
    with _runtime_errors():
        outputs = [torch.from_numpy(output) for output in session.run(None, fed)]
    named = dict(zip(wanted, outputs, strict=False)) if len(outputs) == len(wanted) else {}
    return difference({name: value.cpu() for name, value in wanted.items()}, named)


def _session(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with _runtime_errors():
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def _runtime_errors() -> Iterator[None]:
    """PSG411 for whatever onnxruntime raises; its errors have no base class of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = [kind for kind in vars(state).values() if isinstance(kind, type)]
    refusals: tuple[type[Exception], ...] = (
        ValueError,
        *(kind for kind in kinds if issubclass(kind, Exception)),
    )
    try:
        yield
    except refusals as error:
        raise SurgeryError(
            "PSG411", f"onnxruntime cannot run the model: {first_line(error)}"
        ) from error


def _export(model: GraphModel, plain: nn.Module) -> Any:
    """The plain model as an onnx_ir.Model, with named sizes. PSG412 if it has no translation."""
    inputs = seen_inputs(model)
    shapes = {name: dict.fromkeys(axes, Dim.AUTO) for name, axes in free_axes(model).items()}
    try:
        with silence(), without_fast_path():
            graph = (
                _by_transformers(plain, inputs, shapes)
                if isinstance(plain, PreTrainedModel)
                else _by_torch(plain, inputs, shapes)
            )
    except EXPORT_ERRORS as error:
        raise SurgeryError(
            "PSG412", f"{type(plain).__name__} cannot be written as ONNX: {_reason(error)}"
        ) from error
    _name_sizes(graph)
    return graph


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


def _name_sizes(graph: Any) -> None:
    """Call symbolic sizes what they are: batch, sequence, and sequence1 and so on for more."""
    names: dict[str, str] = {}
    for value in graph.graph.inputs:
        for axis, size in enumerate(value.shape):
            if isinstance(size, int):
                continue
            number = len({name for name in names.values() if name != "batch"})
            names.setdefault(str(size), "batch" if axis == 0 else f"sequence{number or ''}")
    made = (output for node in graph.graph.all_nodes() for output in node.outputs)
    for value in (*graph.graph.inputs, *made):
        if value.shape is not None:
            for axis, size in enumerate(value.shape):
                if not isinstance(size, int) and size.value is not None:
                    value.shape[axis] = _renamed(str(size), names)


def _renamed(text: str, names: Mapping[str, str]) -> str:
    return re.sub(r"[A-Za-z_]\w*", lambda match: names.get(match[0], match[0]), text)


def _size(size: Any) -> int | str:
    return size if isinstance(size, int) else str(size)


def _save(graph: Any, file: Path) -> Path | None:
    """Write a model; the weights go beside it, as ``<name>.data``, if protobuf cannot hold them."""
    import onnx_ir

    total = sum(
        value.const_value.nbytes
        for value in graph.graph.initializers.values()
        if value.const_value is not None
    )
    data = _data_of(file) if total > LARGEST_FILE else None
    onnx_ir.save(graph, file, external_data=None if data is None else data.name)
    return data


def _data_of(file: Path) -> Path:
    """Where the weights of a large model go."""
    return file.with_name(f"{file.name}.data")


def _in_full_precision(plain: nn.Module) -> nn.Module:
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


def need_onnx() -> None:
    """Raise ModuleNotFoundError now for a package of the extra, and not after minutes."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        importlib.import_module(package)
