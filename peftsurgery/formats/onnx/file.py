"""ONNX files: written beside their name, checked, and renamed when they have passed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peftsurgery.capture import GraphModel
from peftsurgery.capture.sharded import check_whole
from peftsurgery.checkpoint.record import FILE, as_json
from peftsurgery.errors import SurgeryError
from peftsurgery.surgery.model.fold_record import fold_record
from peftsurgery.surgery.model.operated import active_operations
from peftsurgery.surgery.model.writable import check_places

# protobuf ends at 2 GiB; the graph itself needs some of it
LARGEST_FILE = 2**31 - 2**27


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file that was written, and how far onnxruntime is from torch.

    ``data`` is the file of its weights if they are beside it; ``inputs`` have the sizes that may
    vary by name. ``slots`` are those inputs that are an adapter's tensors, and may be left out.
    """

    path: str
    data: str | None
    inputs: dict[str, tuple[int | str, ...]]
    outputs: tuple[str, ...]
    difference: float
    dtype: str
    slots: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The file as ``--json`` describes it."""
        return asdict(self)

    def moved(self, path: str) -> OnnxFile:
        """The same file under another name of its directory."""
        data = None if self.data is None else str(Path(path).with_name(Path(self.data).name))
        return replace(self, path=path, data=data)

    def __str__(self) -> str:
        beside = f" and {Path(self.data).name}" if self.data else ""
        slots = f", {len(self.slots)} inputs for adapters' tensors" if self.slots else ""
        return (
            f"ONNX in {self.path}{beside} ({self.dtype}){slots}: onnxruntime is "
            f"{self.difference:.1e} from torch at two unseen shapes"
        )


def write_checked(
    model: GraphModel,
    path: Path,
    make: Callable[[], Any],
    check: Callable[[Path], float],
    dtype: str,
    slots: tuple[str, ...] = (),
) -> OnnxFile:
    """Write the onnx_ir.Model that ``make`` returns, of ``model``, to ``path``.

    ``check`` gives the largest difference of the written file from torch, or refuses it: then
    nothing is left. Raises PSG602 for a place that the model was read from, PSG603 for one that no
    file can have.
    """
    check_whole(model)
    check_places(model, path, data_of(path))
    if path.is_dir():
        raise SurgeryError("PSG603", f"'{path}' is a directory", "name a file: model.onnx")
    folder = path.absolute().with_name(f".{path.name}.part-{os.getpid()}")
    if not folder.parent.is_dir():
        raise SurgeryError("PSG603", f"'{path.parent}' is not a directory", "make it first")
    folder.mkdir()
    try:
        graph = make()
        record = fold_record(model.source, active_operations(model))
        graph.metadata_props[FILE] = as_json(record).decode()
        part = folder / path.name
        data = _save(graph, part)
        apart = check(part)
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
        dtype,
        slots,
    )


def name_sizes(graph: Any, given: Mapping[str, str]) -> None:
    """Call the symbolic sizes of an onnx_ir.Model what they are.

    ``given`` has names for some of them; the others are batch, sequence, sequence1 and so on.
    """
    names = dict(given)
    for value in graph.graph.inputs:
        for axis, size in enumerate(value.shape):
            if isinstance(size, int) or str(size) in names:
                continue
            number = len({name for name in names.values() if name.startswith("sequence")})
            names[str(size)] = "batch" if axis == 0 else f"sequence{number or ''}"
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
    data = data_of(file) if total > LARGEST_FILE else None
    onnx_ir.save(graph, file, external_data=None if data is None else data.name)
    return data


def data_of(file: Path) -> Path:
    """Where the weights of a large model go."""
    return file.with_name(f"{file.name}.data")
