"""The base as a peft adapter needs it: its class, its labels, its vocabulary.

    class        auto_mapping, or the class that transformers has for the task_type; the base's own
                 where the adapter's modules are in that one and not in the other
    labels       the rows of a head that the adapter brings along
    vocabulary   the rows of what the adapter has of the tables of tokens, adapted or saved; else
                 those that the tokenizer beside it needs

The tensors decide. Rows that the adapter saved of a table that it does not train become the
base's, as peft has it when it loads them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from peftsurgery.capture import GraphModel, Source, open_source
from peftsurgery.capture.builds import FILES, Build, class_named, labels_for, tables, tokens_of
from peftsurgery.capture.tensors import tensor_names
from peftsurgery.errors import SurgeryError
from peftsurgery.formats.peft.adapter import PeftAdapter
from peftsurgery.formats.peft.config import AdapterConfig
from peftsurgery.formats.peft.library import FORMAT, peft_words
from peftsurgery.formats.peft.tensor_keys import own_key, unwrapped
from peftsurgery.surgery.fold.vocabulary import built
from peftsurgery.surgery.loading import open_built
from peftsurgery.surgery.model.operated import OperatedModel
from peftsurgery.surgery.model.saved.manifest import is_surgery
from peftsurgery.tokenizer_files import tokenizer_files, tokens_needed


def open_peft_base(
    spec: str, adapter: PeftAdapter, kind: str | None = None, allow_other_base: bool = False
) -> GraphModel:
    """The base at ``spec``, captured as the adapter needs it; ``kind`` names another class.

    PSG218 for a class that does not exist for it; what :func:`open_source` raises.
    """
    if is_surgery(Path(spec)):
        return open_built(spec, replace(FILES, kind=kind), allow_other_base)
    source = _of_class(spec, adapter, kind)
    labels = labels_for(source.module, adapter.shapes())
    build = replace(source.build, labels=labels)
    if labels is not None:
        source = open_source(spec, build)
    wanted = vocabulary_for(source.module, adapter)
    return open_built(spec, replace(wanted, kind=build.kind, labels=labels))


def _of_class(spec: str, adapter: PeftAdapter, kind: str | None) -> Source:
    """The base in the class that is asked for, or that the adapter says and fits."""
    if kind is not None:
        return open_source(spec, replace(FILES, kind=kind))
    own = open_source(spec)
    config = getattr(own.module, "config", None)
    said = None if config is None else said_class(adapter.config.values, config)
    if said in (None, type(own.module).__name__) or own.origin is None or not own.on_meta:
        return own
    other = open_source(spec, replace(FILES, kind=said))
    return own if lost(own.module, adapter) < lost(other.module, adapter) else other


def said_class(values: Mapping[str, Any], config: PreTrainedConfig) -> str | None:
    """The class that an adapter's config says its base has; None if it says none that exists."""
    mapping = values.get("auto_mapping")
    if isinstance(mapping, dict) and isinstance(mapping.get("base_model_class"), str):
        return _known(mapping["base_model_class"], config)
    name = classes_of(str(values.get("task_type"))).get(config.model_type)
    return _known(name[0] if isinstance(name, tuple | list) else name, config)


def class_said(model: nn.Module) -> dict[str, Any]:
    """What a config says of its base's class, as peft does without a task_type.

    A task_type would make peft train and expect the head of that task too. Nothing of a model that
    is none of transformers'.
    """
    kind = type(model)
    if not isinstance(model, PreTrainedModel):
        return {}
    return {"auto_mapping": {"base_model_class": kind.__name__, "parent_library": kind.__module__}}


def _known(name: str | None, config: PreTrainedConfig) -> str | None:
    """A class's name, if transformers has it for a config: others are the adapter's own code."""
    try:
        return None if name is None else class_named(name, config).__name__
    except SurgeryError:
        return None


def lost(model: nn.Module, adapter: PeftAdapter) -> int:
    """Count the adapter's modules and parameters that a model lacks."""
    modules = {path for path, _ in model.named_modules(remove_duplicate=False)}
    owners = {name.rpartition(".")[0] for name in adapter.names.own}
    added = (path for each in (adapter, *adapter.beside) for path in each.names.added)
    return len({*map(unwrapped, added), *owners} - modules)


def vocabulary_for(model: nn.Module, adapter: PeftAdapter) -> Build:
    """The vocabulary that an adapter needs, as a build; ``FILES`` if it is the model's.

    PSG507 if the adapter's tensors are of several; PSG219 if tables of the model that the adapter
    does not train have other numbers of rows than the input's, and could not be told apart after.
    """
    stored, owners = tokens_of(model), tables(model)
    if stored is None:
        return FILES
    wanted = _wanted(stored, list(_sizes(model, owners, adapter)), adapter.folder)
    if wanted == stored:
        return FILES
    build = Build(vocabulary=wanted, stored=stored)
    trained = {name for name in adapter.names.own if adapter.trains(name, model)}
    _check_even(model, owners, trained, build)
    has_tokenizer = bool(tokenizer_files(adapter.folder))
    rows = dict(_rows(model, owners, adapter, build)) if build.added else {}
    known = {*rows, *trained}
    return replace(
        build,
        rows=rows,
        lacking=tuple(_lacking(model, owners, known)) if build.added else (),
        tokenizer=adapter.folder if has_tokenizer else None,
    )


@dataclass(frozen=True)
class _TableSize:
    """How many tokens a tensor at a table is for, and how many rows that table has, by its key."""

    key: str
    rows: int
    own: int


def _wanted(stored: int, sizes: Sequence[_TableSize], folder: Path) -> int:
    """How many rows the tables are to have, where the input's has ``stored``. PSG507.

    A table of another length than the input's that the adapter's tensor fits says nothing of the
    input's; where the adapter has tensors at tables, its tokenizer is not asked.
    """
    told = [size for size in sizes if size.own == stored or size.rows != size.own]
    if len({size.rows for size in told}) > 1:
        listed = ", ".join(f"'{size.key}' for {size.rows}" for size in told)
        message = f"the adapter's tensors are for several vocabularies: {listed}"
        raise SurgeryError("PSG507", message)
    if told:
        return told[0].rows
    return stored if sizes else max(stored, tokens_needed(folder))


def _check_even(
    model: nn.Module, owners: Mapping[str, nn.Module], trained: set[str], build: Build
) -> None:
    """Refuse to resize a table of another length whose rows the adapter does not have. PSG219."""
    names = tensor_names(model)
    for name, parameter in _parameters(owners).items():
        if len(parameter) != build.stored and trained.isdisjoint(names[name]):
            message = (
                f"the vocabulary is to have {build.vocabulary} tokens, and '{name}' has "
                f"{len(parameter)} rows where the table of the input has {build.stored}"
            )
            hint = "load the model, resize each of its tables, and capture that"
            raise SurgeryError("PSG219", message, hint)


def _parameters(owners: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters of tables, by name."""
    named = {
        path: part.named_parameters(recurse=False, remove_duplicate=False)
        for path, part in owners.items()
    }
    return {f"{path}.{leaf}": tensor for path, leaves in named.items() for leaf, tensor in leaves}


def _sizes(
    model: nn.Module, owners: Mapping[str, nn.Module], adapter: PeftAdapter
) -> Iterator[_TableSize]:
    """What the adapter's tensors at tables say of the sizes of those tables."""
    parameters = _parameters(owners)
    for group in (adapter.names.own, adapter.names.again, adapter.names.frozen):
        for name, key in group.items():
            if name in parameters and adapter.tensors[key].dim():
                yield _TableSize(key, len(adapter.tensors[key]), len(parameters[name]))
    for path in owners.keys() & adapter.names.added.keys():
        size = "in" if isinstance(owners[path], nn.Embedding) else "out"
        own = len(owners[path].get_parameter("weight"))
        for suffix, key in adapter.names.added[path].items():
            for dim in _dims(adapter.config, suffix, size):
                value = adapter.tensors[key]
                if dim < value.dim():
                    yield _TableSize(key, value.shape[dim], own)


def _dims(config: AdapterConfig, suffix: str, size: str) -> set[int]:
    """The dimensions that have a size in tensors of a suffix, by the rules of the method."""
    return {
        dim
        for file in config.files
        for rule in file.rules
        for name, given in rule.suffixes(FORMAT).items()
        if given == suffix and rule.kind.name == ("embedding" if size == "in" else "linear")
        for dim, expression in enumerate(rule.params[name].shape)
        if expression.text.strip() == size
    }


def _rows(
    model: nn.Module, owners: Mapping[str, nn.Module], adapter: PeftAdapter, build: Build
) -> Iterator[tuple[str, Tensor]]:
    """The new rows of the base's tables: of the copies that the adapter has and does not train."""
    parameters = _parameters(owners)
    for group in (adapter.names.own, adapter.names.frozen):
        for name, key in group.items():
            trained = group is adapter.names.own and adapter.trains(name, model)
            if name in parameters and not trained:
                yield name, adapter.tensors[key][build.stored :].contiguous()


def _lacking(model: nn.Module, owners: Mapping[str, nn.Module], known: set[str]) -> Iterator[str]:
    """The parameters of tables whose new rows the adapter has nothing of, each by one name."""
    seen: set[int] = set()
    names = tensor_names(model)
    for name, parameter in _parameters(owners).items():
        if id(parameter) not in seen and len(parameter) == tokens_of(model):
            seen.add(id(parameter))
            if known.isdisjoint(names[name]):
                yield name


def saved_tables(model: OperatedModel, adapted: Collection[str]) -> dict[str, Tensor]:
    """The tables of a base with another vocabulary than its files, as peft saves them with it.

    ``adapted`` are the modules with adapters.
    """
    if model.source.build.vocabulary is None:
        return {}
    model.bind()
    names = _parameters(tables(model.source.module))
    return {own_key(name, adapted): model.dense(name).clone() for name in names}


def with_vocabulary(model: GraphModel, adapter: PeftAdapter) -> GraphModel:
    """A captured model with the vocabulary that an adapter needs; the model as it is, else."""
    base = model.base if isinstance(model, OperatedModel) else model
    return built(model, vocabulary_for(base.source.module, adapter))


def classes_of(task: str) -> Mapping[str, Any]:
    """The classes for a task by the type of model, as transformers lists them; none for others."""
    known = peft_words().tasks.get(task)
    return {} if known is None else getattr(modeling_auto, known.classes)
