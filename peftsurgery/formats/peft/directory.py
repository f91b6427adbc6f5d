"""peft's adapters, in and out.

    o = from_peft(g, "adapter")    an adapter that peft saved, on a captured model
    to_peft(o, "adapter")          one that ``PeftModel.from_pretrained(base, "adapter")`` loads

What cannot be honoured, one way or the other, is refused by name; nothing is skipped.
"""

from __future__ import annotations

from pathlib import Path

from peftsurgery.arguments import checked_but
from peftsurgery.capture import GraphModel
from peftsurgery.finite_tensors import as_safetensors
from peftsurgery.formats.exchange import check_captured, chosen_adapter, installed, write_exported
from peftsurgery.formats.peft.adapter import read_adapter
from peftsurgery.formats.peft.files import BASE, CONFIG, TENSORS
from peftsurgery.formats.peft.library import LIBRARY
from peftsurgery.formats.peft.needed_base import with_vocabulary
from peftsurgery.formats.peft.reading import peft_plan
from peftsurgery.formats.peft.whole_model import prefix_notes
from peftsurgery.formats.peft.writing import peft_contents
from peftsurgery.formats.words import config_bytes
from peftsurgery.surgery.model.adapters import check_left_out
from peftsurgery.surgery.model.operated import OperatedModel
from peftsurgery.surgery.model.saved.build import own_tokenizer
from peftsurgery.surgery.plan.cut import adapter_name


@checked_but("model")
def from_peft(
    model: GraphModel, directory: str | Path, name: str = "default", allow_other_base: bool = False
) -> OperatedModel:
    """Read a peft adapter from ``directory`` onto a model, under ``name``; returns a new model.

    Its tensors are parameters beneath their modules, ready to train on; ``model`` stays as it was.
    Where the adapter was made after ``resize_token_embeddings``, the base is captured again with
    that vocabulary, and the report says so. Raises PSG501 to PSG508 for an adapter that is damaged,
    asks for what is not honoured, or was made for another base; PSG319 for a base that something
    was folded into, unless the adapter names it or ``allow_other_base`` is given; PSG219 for a base
    whose vocabulary cannot be changed.
    """
    check_captured(model, "from_peft")
    folder = Path(directory)
    adapter, chosen = read_adapter(folder), adapter_name(name)
    model = with_vocabulary(model, adapter)
    plan = peft_plan(model, adapter, chosen)
    notes = prefix_notes(model, plan.cuts)
    base = adapter.config.values.get(BASE)
    return installed(model, folder, plan, base, adapter.tensors, allow_other_base, notes)


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
    chosen = chosen_adapter(model, name, LIBRARY)
    check_left_out(model.left_out, chosen, "PSG510")
    with model.only(chosen):
        config, tensors, notes = peft_contents(model, chosen)
    contents = {TENSORS: as_safetensors(tensors), CONFIG: config_bytes(config)}
    contents |= own_tokenizer(model.source.build)
    write_exported(model, chosen, Path(directory), contents, CONFIG)
    return notes
