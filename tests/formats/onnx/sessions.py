"""ONNX files run by onnxruntime alone, with an adapter's file put in or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class AdaptedSession:
    """A session on the CPU; ``adapter`` is put into each run."""

    session: Any
    adapter: Path | None = None
    _options: Any = field(default_factory=onnxruntime.RunOptions)
    _kept: list[Any] = field(default_factory=list)  # onnxruntime does not keep it alive itself

    def __post_init__(self) -> None:
        if self.adapter is not None:
            self._kept.append(onnxruntime.LoraAdapter())
            self._kept[0].Load(str(self.adapter))
            self._options.add_active_adapter(self._kept[0])

    def run(self, given: Arrays, names: Sequence[str] | None = None) -> list[np.ndarray[Any, Any]]:
        """The outputs of some names, or all, for inputs by name."""
        found: list[np.ndarray[Any, Any]] = self.session.run(names, dict(given), self._options)
        return found


def opened(file: Path, threads: int = 0) -> Any:
    """A session on the CPU, on so many threads or one for each processor."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = threads
    settings.log_severity_level = (
        3  # it warns of every initializer that is an input: a slot is both
    )
    return onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])


def with_adapter(file: Path, adapter: Path | None = None) -> AdaptedSession:
    """A session on a file, into whose runs an adapter's file is put."""
    return AdaptedSession(opened(file), adapter)
