"""Models written as programs of torch.export, which torch loads without the model's own code.

A program takes tensors by name and returns tensors by name: neither the classes of transformers nor
this package are needed to call it. It is read back and called at two shapes that the export had not
seen before the file gets its name.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from peftsurgery.arguments import checked
from peftsurgery.capture import GraphModel
from peftsurgery.capture.decided import check_undecided
from peftsurgery.capture.export import EXPORT_ERRORS
from peftsurgery.capture.prepared import without_fast_path
from peftsurgery.capture.sharded import check_whole
from peftsurgery.capture.sizes import as_known
from peftsurgery.checkpoint.record import FILE, as_json
from peftsurgery.errors import SurgeryError, first_line
from peftsurgery.formats.onnx.calls import PAST
from peftsurgery.formats.onnx.translate import silence, without_cache
from peftsurgery.formats.plain_lora import one_file, places_read
from peftsurgery.formats.trial_inputs import (
    Inputs,
    free_axes,
    largest_gap,
    output_tensors,
    seen_inputs,
    tolerance_of,
    unseen_inputs,
)
from peftsurgery.surgery.applying import eject
from peftsurgery.surgery.fold.folding import fold
from peftsurgery.surgery.model.fold_record import fold_record, program_record
from peftsurgery.surgery.model.operated import OperatedModel, active_operations

PLAIN = "model.pt2"
"""What the file is called in a directory."""
OWN = ("aten", "prims", "prim", "higher_order")
"""Operators that torch has by itself."""


@dataclass(frozen=True)
class ProgramFile:
    """A program that was written, what it takes and returns, and how far it is from the model.

    ``inputs`` have the sizes that may vary by name. ``difference`` is absolute, the largest at two
    unseen shapes. ``libraries`` are those beside torch whose operators the program calls.
    """

    path: str
    inputs: dict[str, tuple[int | str, ...]]
    outputs: tuple[str, ...]
    difference: float
    dtype: str
    libraries: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The file as ``--json`` describes it."""
        return asdict(self)

    @property
    def notes(self) -> tuple[str, ...]:
        """How the program is called, and what it needs, for whoever loads it."""
        takes = ", ".join(f"{n} [{', '.join(map(str, s))}]" for n, s in self.inputs.items())
        needs = (
            f"it calls operators of {each}, which is to be imported before it is loaded"
            for each in self.libraries
        )
        return (
            f"torch.export.load(FILE).module() takes by name: {takes}",
            f"it returns a dict: {', '.join(self.outputs)}; it is for inference ({self.dtype})",
            "loading a .pt2 unpickles, which can run code: load only files that you trust",
            *needs,
        )


@checked
def export_pt2(
    model: GraphModel,
    path: str | Path,
    adapters: Literal["keep", "fold"] = "keep",
    force: bool = False,
) -> ProgramFile:
    """Write a captured or operated model as a program of torch.export, checked by loading it.

    The active adapters are parts of the program, or with ``adapters="fold"`` in its weights; others
    are left out. It computes what the model does in eval mode, without a cache, in the dtype that
    the model has. Batch and sequence may vary as far as the capture lets them. ``path`` is the
    file, or a directory that gets a ``model.pt2``; what is there is replaced with ``force`` alone.
    Nothing is left if the program, read back, differs by more than 1e-5 in fp32 (8 roundings in
    half precision; relative for outputs above 1).

    Raises what :func:`fold` raises, PSG422 if torch.export cannot write the model, PSG423 if the
    program is not the model, PSG342 if an active adapter is over one that is not, PSG414 if no
    inputs can be made, PSG601 to PSG603 for places, PSG225 for a sharded model.
    """
    check_whole(model)
    model.bind()
    model.check_in_place()
    inputs = places_read(model)
    try:
        with one_file(Path(path), PLAIN, force, inputs) as part:
            written = _write(model, part, adapters == "fold")
    except OSError as error:
        raise SurgeryError("PSG603", f"'{path}' cannot be written: {error.strerror}") from error
    file = Path(path) / PLAIN if Path(path).is_dir() else Path(path)
    return replace(written, path=str(file))


def _write(model: GraphModel, file: Path, folded: bool) -> ProgramFile:
    """Write the program of a model, its active adapters folded or not, and check it."""
    plain = fold(model) if folded else _without_resting(model)
    record = (fold_record if folded else program_record)(model.source, active_operations(model))
    with _as_called(plain, model.source.module):
        seen = seen_inputs(model)
        named = _ByName(plain, seen)
        # what serves these calls is captured now, and not within the export
        if any(name.startswith(PAST) for name in named(**seen)):
            named.flags["use_cache"] = False
            named(**seen)
        if not folded:
            check_undecided((d for c in model.captures for d in c.decisions), "a .pt2 file")
        program = _program(named, seen, free_axes(model))
        _save(program, file, {FILE: as_json(record).decode()})
        cases = [(given, named(**given)) for given in unseen_inputs(model, unrolled=True)]
        dtype, tolerance = tolerance_of(plain)
        apart = _check(file, cases, tolerance)
    sizes, outputs = _sizes(program, seen), tuple(cases[0][1])
    shown = str(dtype).removeprefix("torch.")
    return ProgramFile(str(file), sizes, outputs, apart, shown, _libraries(program))


def _without_resting(model: GraphModel) -> GraphModel:
    """The model without the adapters that are not active: a program would carry their tensors."""
    resting = set(model.adapters) - set(model.active) if isinstance(model, OperatedModel) else ()
    for name in sorted(resting):
        model = eject(model, name)
    return model


@contextmanager
def _as_called(plain: nn.Module, original: nn.Module) -> Iterator[None]:
    """Let a model compute as its program will: in eval mode, without gradients and cache."""
    modes = [(part, part.training) for part in plain.modules()]
    plain.eval()
    try:
        with torch.no_grad(), without_cache(original), without_cache(plain):
            yield
    finally:
        for part, mode in modes:
            part.training = mode


class _ByName(nn.Module):
    """A module that takes and returns tensors by name.

    It says which ones in its signature, where torch.export looks for the sizes that may vary.
    ``flags`` are other arguments of the module, the same in every call.
    """

    def __init__(self, module: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.module = module
        self.flags: dict[str, bool] = {}

        def forward(**given: Tensor) -> dict[str, Tensor]:
            return output_tensors(module(**given, **self.flags))

        kind = inspect.Parameter.KEYWORD_ONLY
        parameters = [inspect.Parameter(name, kind) for name in names]
        vars(forward)["__signature__"] = inspect.Signature(parameters)
        vars(self)["forward"] = forward


def _program(named: _ByName, seen: Inputs, free: Mapping[str, list[int]]) -> ExportedProgram:
    """What torch.export makes of a model. PSG422 if it cannot."""
    shapes = {name: dict.fromkeys(axes, Dim.AUTO) for name, axes in free.items()}
    try:
        with silence(), without_fast_path():
            return torch.export.export(named, (), seen, dynamic_shapes=shapes, strict=False)
    except EXPORT_ERRORS as error:
        raise _unwritten(error) from error


def _save(program: ExportedProgram, file: Path, extra: dict[str, Any]) -> None:
    """Write a program. PSG422 if torch has no form for a part of it."""
    try:
        # to an open file: the archive's folder is called after a path, which is a passing one here
        with silence(), _Steady(file, "wb") as stream:
            torch.export.save(program, stream, extra_files=extra)
    except EXPORT_ERRORS as error:
        raise _unwritten(error) from error
    if stream.error is not None:
        raise stream.error


class _Steady(io.FileIO):
    """A file that keeps its first error for the end; torch ends the process where a write fails."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of the bytes, unless a write has failed."""
        view, done = memoryview(data).cast("B"), 0
        while self.error is None and done < len(view):
            try:
                done += super().write(view[done:])
            except OSError as error:
                self.error = error
        return len(view)


def _unwritten(error: Exception) -> SurgeryError:
    hint = "adapters='fold' (--adapters fold) writes the model with its adapters in the weights"
    message = f"torch.export cannot write the model: {first_line(error)}"
    return SurgeryError("PSG422", message, hint)


def _check(
    file: Path, cases: Iterable[tuple[Inputs, Mapping[str, Tensor]]], tolerance: float
) -> float:
    """Read a program back and call it; the largest absolute difference. PSG423 if it is another."""
    try:
        with silence():
            loaded = torch.export.load(file).module()  # written by ourselves a moment ago
            found = [(given, wanted, loaded(**given)) for given, wanted in cases]
    except EXPORT_ERRORS as error:
        message = f"the program cannot be loaded and called: {first_line(error)}"
        raise SurgeryError("PSG423", message) from error
    return largest_gap(found, tolerance, "PSG423", "the program's")


def _sizes(program: ExportedProgram, seen: Inputs) -> dict[str, tuple[int | str, ...]]:
    """The shape of each input; sizes that may vary are batch, sequence, sequence1 and so on."""
    names = dict[str, str]()
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    found = dict[str, tuple[int | str, ...]]()
    for name, user_input in zip(seen, program.graph_signature.user_inputs, strict=True):
        shape = list[int | str]()
        for axis, size in enumerate(map(as_known, nodes[str(user_input)].meta["val"].shape)):
            if not isinstance(size, int) and str(size) not in names:
                number = len({each for each in names.values() if each.startswith("sequence")})
                names[str(size)] = "batch" if axis == 0 else f"sequence{number or ''}"
            shape.append(size if isinstance(size, int) else names[str(size)])
        found[name] = tuple(shape)
    return found


def _libraries(program: ExportedProgram) -> tuple[str, ...]:
    """Whose operators a program calls, beside those that torch has by itself."""
    parts = [part for part in program.graph_module.modules() if isinstance(part, fx.GraphModule)]
    called = [node for part in parts for node in part.graph.nodes if node.op == "call_function"]
    names = {getattr(node.target, "namespace", OWN[0]) for node in called}
    return tuple(sorted(names.difference(OWN)))
