"""peft's adapters, in and out.

    o = from_peft(g, "adapter")    an adapter that peft saved, on a captured model
    to_peft(o, "adapter")          one that ``PeftModel.from_pretrained(base, "adapter")`` loads

What cannot be honoured, one way or the other, is refused by name; nothing is skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from peftsurgery.arguments import checked_but
from peftsurgery.capture import GraphModel
from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.formats.peft.adapter import read_adapter
from peftsurgery.formats.peft.config import FORMAT
from peftsurgery.formats.peft.files import BASE, CONFIG, TENSORS, write_adapter
from peftsurgery.formats.peft.needed_base import saved_tables, with_vocabulary
from peftsurgery.formats.peft.prefix import KIND, LENGTH, export_prefix, is_prefix
from peftsurgery.formats.peft.prompts import export_prompt, is_prompt
from peftsurgery.formats.peft.reading import Importer
from peftsurgery.formats.peft.tensor_keys import without_wrapper
from peftsurgery.formats.peft.window_notes import window_notes
from peftsurgery.formats.peft.writing import wrapped_adapter
from peftsurgery.surgery.applying import check_taken, operate
from peftsurgery.surgery.fold.flattening import flatten
from peftsurgery.surgery.model.adapters import check_left_out
from peftsurgery.surgery.model.operated import OperatedModel
from peftsurgery.surgery.model.provenance import check_places, clear_export_record, export_record
from peftsurgery.surgery.model.same_base import check_adapter_base
from peftsurgery.surgery.model.saved_build import own_tokenizer
from peftsurgery.surgery.plan.cut import Operation, adapter_name


@checked_but("model")
def from_peft(
    model: GraphModel,
    directory: str | Path,
    name: str = "default",
    allow_other_base: bool = False,
) -> OperatedModel:
    """Read a peft adapter from ``directory`` onto a model, under ``name``; returns a new model.

    Its tensors are parameters beneath their modules, ready to train on; ``model`` stays as it was.
    Where the adapter was made after ``resize_token_embeddings``, the base is captured again with
    that vocabulary, and the report says so. Raises PSG501 to PSG508 for an adapter that is damaged,
    asks for what is not honoured, or was made for another base; PSG319 for a base that something
    was folded into, unless the adapter names it or ``allow_other_base`` is given; PSG219 for a base
    whose vocabulary cannot be changed.
    """
    if not isinstance(model, GraphModel):
        message = f"an adapter is put on a captured model, not on a {type(model).__name__}"
        raise SurgeryError("PSG309", message, "capture it first: from_peft(capture(model), ...)")
    folder = Path(directory)
    adapter, chosen = read_adapter(folder), adapter_name(name)
    model = with_vocabulary(model, adapter)
    plan = Importer(model, adapter, chosen).plan()
    base = adapter.config.values.get(BASE)
    origin = check_adapter_base(folder, base, adapter.tensors, model.source, allow_other_base)
    notes = (*origin.notes, *_notes(model, plan.operations))
    origin = replace(origin, notes=notes)
    operated = operate(model, [replace(op, origin=origin) for op in plan.operations], plan.known)
    check_taken(str(folder), operated, model, plan.operations, plan.known)
    return operated


def _notes(model: GraphModel, operations: Sequence[Operation]) -> tuple[str, ...]:
    """Notes on what peft computes otherwise than the adapter as it was read."""
    prefixes = (op for op in operations if any(r.kind.name == KIND for r in op.file.rules))
    lengths = (op.settings[op.file.carried(FORMAT)[LENGTH]] for op in prefixes)
    return tuple(note for length in lengths for note in window_notes(model, length))


@checked_but("model")
def to_peft(
    model: OperatedModel, directory: str | Path, name: str | None = None
) -> tuple[str, ...]:
    """Write the adapter ``name`` (or the only one) as peft does, for ``PeftModel.from_pretrained``.

    Where the base has another vocabulary than its files, its tables and the tokenizer that came
    with it are written too. Returns notes for the reader: what is otherwise in peft.

    Raises PSG510 for what peft has no form for, PSG511 if it is not clear which adapter is meant,
    PSG601 and PSG603 if the directory cannot be written.
    """
    operations = model.operations if isinstance(model, OperatedModel) else ()
    names = list(dict.fromkeys(operation.name for operation in operations))
    if not names:
        raise SurgeryError("PSG511", "the model has no adapters", "apply rules to it first")
    if name is None and len(names) > 1:
        message = f"the model has {len(names)} adapters, and a directory of peft's holds one"
        raise SurgeryError("PSG511", message, f"choose by name: {', '.join(names)}")
    chosen = names[0] if name is None else name
    if chosen not in names:
        raise SurgeryError("PSG511", f"there is no adapter '{name}'", did_you_mean(chosen, names))
    check_left_out(model.left_out, chosen, "PSG510")
    folder, others = Path(directory), own_tokenizer(model.source.build)
    check_places(model, *(folder / file for file in (CONFIG, TENSORS, *others)))
    with model.only(chosen):
        cuts = [cut for cut in model.cuts if cut.operation.name == chosen]
        if is_prompt(model, chosen):
            wraps, (config, tensors) = False, export_prompt(model, chosen)
        else:
            flat = flatten(model)
            cuts = [cut for cut in flat.cuts if cut.operation.name == chosen]
            wraps = not is_prefix(cuts)
            config, tensors = (wrapped_adapter if wraps else export_prefix)(flat, chosen)
        adapted = {cut.placed.module for cut in cuts if wraps and cut.rule.params}
        tables = saved_tables(model, adapted)
    if not wraps:
        tables = {without_wrapper(key): value for key, value in tables.items()}
    others |= export_record(model, chosen)
    write_adapter(folder, config, tables | tensors, others)
    clear_export_record(folder, others)
    return window_notes(model, config[LENGTH]) if is_prefix(cuts) else ()
