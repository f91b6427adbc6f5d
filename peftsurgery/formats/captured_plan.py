"""Plans of folds by the model's graph: which weight a site reads, which rows of it, how it lies.

No weights are needed for that: the base is captured on the meta device.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from peftsurgery.capture.tensors import tensor_names
from peftsurgery.checkpoint.card import CARD, card_of
from peftsurgery.checkpoint.plan import FoldPlan, Planned, SiteFold, without_repeats
from peftsurgery.errors import SurgeryError
from peftsurgery.finite_tensors import as_safetensors
from peftsurgery.formats.pretrained import open_adapter
from peftsurgery.language.parameter_axes import sized_axes
from peftsurgery.language.rule_algebra import rows_of
from peftsurgery.model_files import ModelFiles, read_model_files
from peftsurgery.quiet import quiet
from peftsurgery.surgery.model.fold_record import fold_record
from peftsurgery.surgery.model.operated import OperatedModel, active_operations
from peftsurgery.surgery.model.saved.manifest import is_surgery, read_manifest
from peftsurgery.surgery.plan.cut import Cut, copy_name
from peftsurgery.surgery.rewrite.folded_weights import fold_cuts
from peftsurgery.tensor_file import read_header
from peftsurgery.tokenizer_files import is_tokenizer_file, tokenizer_files


def captured_plan(adapter: Path, base: str | None, allow_other_base: bool, room: Path) -> Planned:
    """Plan the fold of an adapter by capturing its base without weights.

    The adapter's tensors are written to the directory ``room``, by their names in the model.
    Raises what :func:`open_adapter` raises, and PSG416 for what cannot be folded on files.
    """
    with quiet():
        operated = open_adapter(adapter, base, allow_other_base)
    folder = operated.source.folder
    if folder is None:
        raise SurgeryError("PSG416", f"the base of '{adapter}' is no directory", "give its path")
    plan = fold_plan(operated, read_model_files(folder), adapter)
    learnt = room / "adapter.safetensors"
    learnt.write_bytes(as_safetensors(operated.learnt(*operated.active)))
    return Planned(plan, folder, read_header(learnt))


def fold_plan(model: OperatedModel, files: ModelFiles, adapter: Path) -> FoldPlan:
    """Plan the fold of a model's active adapters into the files of its base.

    Raises PSG416 for what the files cannot be given: a base that was built otherwise than they say,
    weights kept in four bits, buffers that training moved, a tie that would be broken, a weight
    that is stored under no name that the model knows.
    """
    _check_plain(model, adapter)
    cuts = fold_cuts(model.foldable())
    stored = _stored_names(model.source.module, files, cuts, model.trained)
    sites = without_repeats(_site_fold(cut, stored) for cut in cuts)
    learnt = model.learnt(*model.active)
    replaced = {stored[name]: _copy_of(name, model.active, learnt) for name in model.trained}
    record = fold_record(model.source, active_operations(model))
    own = tokenizer_files(adapter)
    without = {each.name for each in files.folder.iterdir() if own and is_tokenizer_file(each.name)}
    if not (files.folder / CARD).exists():
        is_transformers = isinstance(model.source.module, PreTrainedModel)
        own = {**own, CARD: card_of(record, is_transformers).encode()}
    return FoldPlan(tuple(sites), replaced, record, own, frozenset(without))


def _check_plain(model: OperatedModel, adapter: Path) -> None:
    """Refuse a base whose files are not the model that is folded. PSG416."""
    why = None
    if model.source.build:
        why = next(iter(model.source.build.notes), "the base is built otherwise than its files say")
    elif model.stored:
        why = f"'{min(model.stored)}' is kept in four bits, and the base's files hold it whole"
    elif is_surgery(adapter) and read_manifest(adapter).buffers:
        why = f"training moved the buffer '{read_manifest(adapter).buffers[0]}'"
    if why is not None:
        raise SurgeryError("PSG416", why, "fold in memory: fold_to_directory")


def _stored_names(
    module: nn.Module, files: ModelFiles, cuts: Iterable[Cut], trained: Iterable[str]
) -> dict[str, str]:
    """The names that weights have in the files, by their names in the model. PSG416.

    Of a model without its head the files may lack the prefix, and of one with a head have it.
    """
    for cut in cuts:
        for names in cut.made.values():
            why = f"the weight of '{cut.placed.module}' is computed of {', '.join(names)}"
            raise SurgeryError("PSG416", why, "fold in memory: fold_to_directory")
    ties, held = tensor_names(module), files.tensors
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    stored = {}
    changed = {
        *trained,
        *(cut.weights[n] for cut in cuts for n in cut.rule.fold if n in cut.weights),
    }
    for name in sorted({*changed, *(name for cut in cuts for name in cut.weights.values())}):
        if name in changed and len(ties[name]) > 1:
            others = ", ".join(other for other in ties[name] if other != name)
            why = f"'{name}' is tied to {others}, which the fold would change or untie"
            raise SurgeryError("PSG416", why, "fold in memory: fold_to_directory")
        spelled = (name, name.removeprefix(prefix), prefix + name)
        found = next((each for each in spelled if each in held), None)
        shape = tuple(module.get_parameter(name).shape)
        if found is None or held[found][1].shape != shape:
            why = f"'{name}', which the fold changes, is in no file of '{files.folder}' as it is"
            raise SurgeryError("PSG416", why, "fold in memory: fold_to_directory")
        stored[name] = found
    return stored


def _copy_of(parameter: str, adapters: Iterable[str], learnt: Collection[str]) -> str:
    """The name of the trained copy of a parameter among what was learnt."""
    names = (copy_name(parameter, adapter) for adapter in adapters)
    return next((name for name in names if name in learnt), parameter)


def _site_fold(cut: Cut, stored: Mapping[str, str]) -> SiteFold:
    """One cut as plain data."""
    rule, site = cut.rule, cut.site
    size = rows_of(rule, cut.numbers)
    part = site.slice
    return SiteFold(
        adapter=cut.operation.name,
        module=cut.placed.module,
        weights={name: stored[full] for name, full in cut.weights.items()},
        parameters=cut.parameters,
        numbers=cut.numbers,
        fold=rule.fold,
        let=rule.let,
        absent=tuple(name for name in rule.kind.weights if name not in site.nodes),
        turned=site.turned,
        slice=None if part is None else (part.start, part.length, part.period, part.groups),
        rows=None if size is None else sized_axes(rule, size),
    )
