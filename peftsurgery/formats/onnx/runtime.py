"""onnxruntime as the judge of ONNX files: torch's outputs at sizes that it had not seen."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from peftsurgery.errors import SurgeryError, first_line
from peftsurgery.formats.trial_inputs import TOLERANCE, Tensors, largest_gap


def check_outputs(file: Path, cases: Iterable[tuple[Tensors, Tensors]]) -> float:
    """Run a file on inputs by name; the largest difference from the outputs that belong to them.

    PSG411 if it is above the tolerance, or if the file cannot be run.
    """
    session = open_session(file)
    inputs = (*session.get_inputs(), *session.get_overridable_initializers())
    outputs = [value.name for value in session.get_outputs()]

    def run() -> Iterator[tuple[Tensors, Tensors, Tensors]]:
        for given, wanted in cases:
            fed = {v.name: given[v.name].detach().cpu().numpy() for v in inputs if v.name in given}
            with runtime_errors():
                found = [torch.from_numpy(output) for output in session.run(outputs, fed)]
            named = dict(zip(wanted, found, strict=False)) if len(found) == len(wanted) else {}
            yield given, {name: value.detach().cpu() for name, value in wanted.items()}, named

    return largest_gap(run(), TOLERANCE, "PSG411", "onnxruntime's")


def open_session(file: Path) -> Any:
    """A session of onnxruntime on the CPU. PSG411 if it refuses the file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with runtime_errors():
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def runtime_errors() -> Iterator[None]:
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


def need_onnx() -> None:
    """Raise ModuleNotFoundError now for a package of the extra, and not after minutes."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        importlib.import_module(package)
