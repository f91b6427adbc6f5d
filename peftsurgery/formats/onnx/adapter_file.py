"""Adapters as onnxruntime takes them: files of tensors for the slots of an ONNX model."""

from __future__ import annotations

from pathlib import Path

from peftsurgery.arguments import checked
from peftsurgery.formats.onnx.runtime import need_onnx
from peftsurgery.formats.onnx.slots import with_slots
from peftsurgery.outputs import fresh
from peftsurgery.surgery.model.operated import OperatedModel
from peftsurgery.surgery.model.writable import check_places


@checked
def to_ort(model: OperatedModel, path: str | Path) -> None:
    """Write a model's active adapters to ``path``, an ``.onnx_adapter`` file of fp32 tensors.

    They have the names that :func:`export_onnx` gives to the inputs of a model with
    ``adapters="inputs"``, which were made of any adapter of the same method; the numbers that the
    method computes from its settings, such as LoRA's alpha / rank, are among them. onnxruntime puts
    the file in with ``RunOptions.add_active_adapter``. Raises PSG413 if no adapter is active.
    """
    need_onnx()
    from onnxruntime import AdapterFormat, OrtValue

    check_places(model, Path(path))
    _, slots = with_slots(model)
    arrays = {name: slots.values[name].cpu().contiguous().numpy() for name in sorted(slots.values)}
    adapter = AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters({n: OrtValue.ortvalue_from_numpy(v) for n, v in arrays.items()})
    with fresh(Path(path), [], True) as part:
        adapter.export_adapter(str(part))
