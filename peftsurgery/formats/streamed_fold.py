"""Folds of checkpoints: an adapter's directory made into a plan, which is carried out on files.

The plan needs the model's graph (which weight a site reads, which rows of it, how it lies in
memory) but no weights: the base is captured on the meta device. Carrying it out needs the weights
and no graph; see :mod:`peftsurgery.checkpoint`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn
from transformers import PreTrainedModel

from peftsurgery.arguments import checked
from peftsurgery.capture.tensors import tensor_names
from peftsurgery.checkpoint.plan import FoldPlan, SiteFold, without_repeats
from peftsurgery.checkpoint.streaming import FoldReport, fold_files
from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.finite_tensors import as_safetensors
from peftsurgery.formats.model_card import CARD, card_of
from peftsurgery.formats.pretrained import open_adapter
from peftsurgery.language.rule_algebra import rows_of, sized_axes
from peftsurgery.model_files import ModelFiles, read_model_files
from peftsurgery.outputs import check_free
from peftsurgery.quiet import quiet
from peftsurgery.surgery.model.fold_record import fold_record
from peftsurgery.surgery.model.operated import OperatedModel, active_operations
from peftsurgery.surgery.model.saved.build import is_tokenizer_file, tokenizer_files
from peftsurgery.surgery.model.saved.manifest import is_surgery, read_manifest
from peftsurgery.surgery.plan.cut import Cut, copy_name
from peftsurgery.surgery.rewrite.folded_weights import fold_cuts
from peftsurgery.tensor_file import read_header

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


@checked
def fold_checkpoint(
    adapter: str | Path,
    base: str | Path | None,
    out: str | Path,
    dtype: str | None = None,
    resume: bool = False,
    reversible: bool = False,
    allow_other_base: bool = False,
    progress: Callable[[int], None] | None = None,
) -> FoldReport:
    """Fold an adapter's directory into the files of its base, without building the model.

    ``adapter`` is a saved surgery or a peft adapter, ``base`` the directory of its base if not the
    one that it names, ``out`` what is written; a run that was broken off goes on with ``resume``.
    Changes are added in fp32 a few rows at a time and rounded once, to the base's dtype or to
    ``dtype`` ("float32", "bfloat16", "float16"); all other bytes are copied. With ``reversible``,
    residuals beside the weights let :func:`unfold_checkpoint` restore the base without the base.
    ``progress`` is told the bytes that are written. ``peftsurgery.json`` in ``out`` is the
    certificate that :func:`verify` checks.

    Raises what :func:`fold` raises of rules that cannot be folded, PSG319 for another base, PSG415
    if nothing would change, PSG416 for what cannot be folded on files, PSG601 and PSG602 for a
    place that is taken or read, PSG610 for what an earlier run left.
    """
    if dtype is not None and dtype not in DTYPES:
        raise SurgeryError("PSG904", f"there is no dtype '{dtype}'", did_you_mean(dtype, DTYPES))
    if dtype is not None and reversible:
        message = "residuals are of the base's dtype, and another one is to be written"
        raise SurgeryError("PSG904", message, "give either dtype= or reversible=")
    target, source = Path(out), Path(adapter)
    check_free(target, [str(each) for each in (adapter, base) if each is not None])
    with quiet():
        named = None if base is None else str(base)
        operated = open_adapter(source, named, allow_other_base)
    folder = operated.source.folder
    if folder is None:
        raise SurgeryError("PSG416", f"the base of '{adapter}' is no directory", "give its path")
    check_free(target, [str(folder)])
    plan = fold_plan(operated, read_model_files(folder), source)
    with TemporaryDirectory() as temporary:
        learnt = Path(temporary, "adapter.safetensors")
        learnt.write_bytes(as_safetensors(operated.learnt(*operated.active)))
        code = None if dtype is None else DTYPES[dtype]
        return fold_files(
            plan, folder, read_header(learnt), target, code, resume, reversible, progress
        )


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
