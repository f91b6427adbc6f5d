"""export_adapter: an adapter in the format of another program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from peftsurgery.arguments import checked_but
from peftsurgery.capture.sharded import check_whole
from peftsurgery.errors import SurgeryError
from peftsurgery.formats.adapterhub.directory import to_adapterhub
from peftsurgery.formats.gguf.writing import to_gguf
from peftsurgery.formats.kohya.writing import to_kohya
from peftsurgery.formats.mlx.writing import to_mlx
from peftsurgery.formats.onnx.adapter_file import to_ort
from peftsurgery.formats.peft.directory import to_peft
from peftsurgery.formats.plain_lora import places_read
from peftsurgery.formats.vllm.writing import to_vllm
from peftsurgery.outputs import fresh
from peftsurgery.surgery.model.operated import OperatedModel

Target = Literal["peft", "adapterhub", "vllm", "gguf", "mlx", "kohya", "ort"]
Write = Callable[[OperatedModel, Path, str | None, bool], tuple[str, ...]]


def _by(library: Callable[..., tuple[str, ...] | None]) -> Write:
    """Writing of a library's directory, whole or not at all."""

    def write(model: OperatedModel, out: Path, name: str | None, force: bool) -> tuple[str, ...]:
        with fresh(out, places_read(model), force) as part:
            return library(model, part, name) or ()

    return write


TARGETS: Mapping[str, Write] = {
    "peft": _by(to_peft),
    "adapterhub": _by(to_adapterhub),
    "vllm": to_vllm,
    "gguf": to_gguf,
    "mlx": to_mlx,
    "kohya": to_kohya,
    "ort": to_ort,
}


@checked_but("model")
def export_adapter(
    model: OperatedModel,
    path: str | Path,
    to: Target,
    name: str | None = None,
    force: bool = False,
) -> tuple[str, ...]:
    """Write the adapter ``name`` (or the only one) for another program; returns notes for users.

    ``to`` is peft, adapterhub, vllm (a peft directory within its rules), gguf (llama.cpp), mlx,
    kohya (diffusers) or ort (onnxruntime, for a model that :func:`export_onnx` wrote with
    ``adapters="inputs"``). vllm, gguf, mlx and kohya take plain LoRA alone: :func:`as_lora` makes
    one of any foldable change. ``path`` is a directory; for gguf, kohya and ort it may be a file.
    It must not
    exist, unless with ``force`` or as a directory for one file. Nothing is written if the program
    would refuse, ignore or misread any part.

    Raises SurgeryError: PSG510 to PSG512 as :func:`to_peft` and :func:`to_adapterhub` do, PSG520
    for what is no plain LoRA, PSG521 for a part that the program cannot say, PSG522 for an
    architecture whose names there are not known, PSG601 to PSG603 for places, PSG225 for a sharded
    model.
    """
    check_whole(model)
    try:
        return TARGETS[to](model, Path(path), name, force)
    except OSError as error:
        raise SurgeryError("PSG603", f"'{path}' cannot be written: {error.strerror}") from error
