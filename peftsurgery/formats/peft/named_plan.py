"""Plans of folds by the names of a peft adapter's tensors: see :mod:`.named_sites`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peftsurgery.checkpoint.card import files_beside
from peftsurgery.checkpoint.codecs.coded import plain_view
from peftsurgery.checkpoint.plan import FoldPlan, Planned
from peftsurgery.checkpoint.record import entry_of, record_of
from peftsurgery.fingerprint import Fingerprint, content_digest, on_disk
from peftsurgery.formats.peft.files import BASE, CONFIG, read_peft_config
from peftsurgery.formats.peft.named_sites import NamedFold, named_fold
from peftsurgery.model_files import are_here, read_model_files


def named_plan(adapter: Path, base: str | None, recorded: bool = True) -> Planned | None:
    """Plan the fold of a peft adapter by names; None if they do not say all that it takes.

    ``base`` is the directory of its base, if not the one that the adapter names. With ``recorded``
    the tensors of both are read for their fingerprints. Raises PSG207 for weights that cannot be
    read, PSG501 to PSG506 for an adapter that is damaged or not honoured.
    """
    if not (adapter / CONFIG).is_file():
        return None
    named = base or read_peft_config(adapter).get(BASE)
    if not named or not os.path.isdir(named) or not are_here(Path(named)):
        return None
    files = read_model_files(Path(named))
    fold = named_fold(adapter, plain_view(files))
    if fold is None:
        return None
    record = _record(fold, adapter, str(named)) if recorded else {}
    own, without = files_beside(adapter, files.folder, record, True)
    plan = FoldPlan(fold.sites, record=record, files=own, without=without)
    return Planned(plan, files.folder, fold.adapter.file)


def _record(fold: NamedFold, folder: Path, base: str) -> dict[str, Any]:
    """What is folded into what."""
    file, held = fold.adapter.file, fold.adapter.base.files.tensors
    content = content_digest(on_disk(file, tensor) for tensor in file.tensors.values())
    entries = (
        entry_of("default", page.name, page.text(), settings, folder, content)
        for page, settings in fold.methods
    )
    prints = {name: on_disk(*where).print() for name, where in held.items()}
    return record_of(base, Fingerprint(prints), entries)
