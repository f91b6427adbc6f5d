"""Adapters as onnxruntime takes them: files of tensors for the slots of an ONNX model."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from peftsurgery.formats.onnx.runtime import need_onnx
from peftsurgery.formats.onnx.slots import slot_names, with_slots
from peftsurgery.formats.plain_lora import one_file, places_read
from peftsurgery.surgery.model.operated import OperatedModel

FILE = "adapter.onnx_adapter"


def to_ort(model: OperatedModel, out: Path, name: str | None, force: bool) -> tuple[str, ...]:
    """Write the active adapters, or ``name`` alone, to the file ``out``, or into a directory.

    The tensors are fp32, and have the names that :func:`export_onnx` gives to the inputs of a model
    with ``adapters="inputs"``: one that was made of any adapter of the same method, or, where
    several of one method are active here, of this model. The numbers that the method computes from
    its settings, such as LoRA's alpha / rank, are among them. onnxruntime puts the file in with
    ``RunOptions.add_active_adapter``. Raises PSG413 if no adapter is active.
    """
    need_onnx()
    from onnxruntime import AdapterFormat, OrtValue

    called = slot_names(model)
    with nullcontext() if name is None else model.only(name):
        _, slots = with_slots(model, called)
    arrays = {n: value.cpu().contiguous().numpy() for n, value in sorted(slots.values.items())}
    adapter = AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters({n: OrtValue.ortvalue_from_numpy(v) for n, v in arrays.items()})
    with one_file(out, FILE, force, places_read(model)) as file:
        adapter.export_adapter(str(file))
    return ()
