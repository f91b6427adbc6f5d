"""peft's adapters, in and out.

    o = from_peft(g, "adapter")    an adapter that peft saved, on a captured model
    to_peft(o, "adapter")          one that ``PeftModel.from_pretrained(base, "adapter")`` loads

What cannot be honoured, one way or the other, is refused by name; nothing is skipped.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..arguments import checked_but
from ..capture import GraphModel
from ..errors import SurgeryError, did_you_mean
from ..surgery import (
    OperatedModel,
    adapter_name,
    check_adapter_base,
    check_left_out,
    check_places,
    check_taken,
    flatten,
    operate,
)
from ..surgery.provenance import export_record
from .peft_config import AdapterConfig
from .peft_export import export
from .peft_files import BASE, CONFIG, TENSORS, read_config, read_tensors, write_adapter
from .peft_import import Importer
from .peft_prefix import export_prefix, is_prefix
from .peft_prompts import export_prompt, is_prompt


@checked_but("model")
def from_peft(
    model: GraphModel,
    directory: str | Path,
    name: str = "default",
    allow_other_base: bool = False,
) -> OperatedModel:
    """``model`` with the adapter that peft saved in ``directory``, under ``name``.

    Its tensors are parameters beneath their modules, ready to train on; the base stays as it was.
    Raises PSG501 to PSG508 for an adapter that is damaged, asks for what is not honoured, or was
    made for another base; PSG319 for a base that something was folded into, unless the adapter
    names it or ``allow_other_base`` is given.
    """
    if not isinstance(model, GraphModel):
        message = f"an adapter is put on a captured model, not on a {type(model).__name__}"
        raise SurgeryError("PSG309", message, "capture it first: from_peft(capture(model), ...)")
    folder = Path(directory)
    config = AdapterConfig(read_config(folder))
    tensors = read_tensors(folder)
    plan = Importer(model, config, tensors, adapter_name(name)).plan()
    base = config.values.get(BASE)
    origin = check_adapter_base(folder, base, tensors, model.source, allow_other_base)
    operated = operate(model, [replace(op, origin=origin) for op in plan.operations], plan.known)
    check_taken(str(folder), operated, model, plan.operations, plan.known)
    return operated


@checked_but("model")
def to_peft(model: OperatedModel, directory: str | Path, name: str | None = None) -> None:
    """Write the adapter ``name`` (or the only one) as peft does, for ``PeftModel.from_pretrained``.

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
    check_left_out(model, chosen, "PSG510")
    check_places(model, Path(directory) / CONFIG, Path(directory) / TENSORS)
    with model.only(chosen):
        if is_prompt(model, chosen):
            config, tensors = export_prompt(model, chosen)
        else:
            flat = flatten(model)
            cuts = [cut for cut in flat.cuts if cut.operation.name == chosen]
            config, tensors = (export_prefix if is_prefix(cuts) else export)(flat, chosen)
    write_adapter(Path(directory), config, tensors, export_record(model, chosen))
