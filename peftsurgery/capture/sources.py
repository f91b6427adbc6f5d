"""Where a captured model comes from, and where its weights are when they are needed.

A live module brings its weights. A directory or hub id is read as a config only: the module is
built on the meta device, and its weights are read (memory-mapped, by transformers) when a graph
first runs.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from peftsurgery.capture.builds import FILES, Build, class_named, resize
from peftsurgery.capture.copying import SharedByCopies
from peftsurgery.capture.factories import Inputs, made_by
from peftsurgery.capture.folded_module import folded_module, is_folded_module
from peftsurgery.capture.ties import tied_apart, untie_as_stored
from peftsurgery.errors import SurgeryError, closest, did_you_mean, first_line
from peftsurgery.finite_tensors import DTYPES, FLOATS
from peftsurgery.model_files import are_here, read_model_files, refuse_program
from peftsurgery.places import is_hub_id
from peftsurgery.quiet import quiet

# What configs of transformers, and the models made of them, raise for values that do not fit.
CONFIG_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


class Source(SharedByCopies):
    """The module a capture was made of; ``weights()`` is the same module with its tensors.

    ``build`` says what is otherwise than in the files there, whose config is ``stored``, or in the
    live model that is the module of ``unbuilt``. ``inputs`` are the example inputs that the module
    came with, if it did. Once the weights are loaded, ``notes`` says which tensors the module and
    the files do not share, and ``missing`` names those that the files have no values for.
    """

    def __init__(
        self,
        module: nn.Module,
        origin: str | None = None,
        build: Build = FILES,
        stored: PreTrainedConfig | None = None,
        before: Source | None = None,
        inputs: Inputs | None = None,
    ) -> None:
        self.module = module
        self.origin = origin
        self.build = build
        self.inputs = inputs
        self.stored = getattr(module, "config", None) if stored is None else stored
        self.unbuilt = self if before is None else before
        self.notes: tuple[str, ...] = ()
        self.missing: frozenset[str] = frozenset()
        self._loaded: nn.Module | None = None

    @property
    def on_meta(self) -> bool:
        """Whether the module has no weights yet."""
        return any(tensor.is_meta for tensor in self.module.parameters())

    def weights(self) -> nn.Module:
        """The module with its weights, loaded once. PSG207 if it has none anywhere."""
        if not self.on_meta:
            return self.module
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def resized(self, build: Build) -> Source:
        """The source with the vocabulary of a build, which it has no weights for yet.

        PSG219 if its class cannot change it.
        """
        module = copy.deepcopy(self.module)
        assert isinstance(module, PreTrainedModel)
        resize(module, build)
        return Source(module, self.origin, build, self.stored)

    @property
    def folder(self) -> Path | None:
        """The directory with the model's files, which may be the hub's cache; None without one."""
        if self.origin is None:
            return None
        if os.path.isdir(self.origin):
            return Path(self.origin)
        if self.origin.count("/") > 1 or ":" in self.origin:
            return None
        config = try_to_load_from_cache(self.origin, "config.json", constants.HF_HUB_CACHE)
        return Path(config).parent if isinstance(config, str) else None

    @property
    def is_readable(self) -> bool:
        """Whether the module has weights, here or where it came from."""
        return not self.on_meta or self.origin is not None

    def release(self) -> None:
        """Drop loaded weights from memory; they are read again on demand."""
        self._loaded = None

    @quiet()
    def _load(self) -> nn.Module:
        if self.origin is None or not isinstance(self.module, PreTrainedModel):
            message = f"this {type(self.module).__name__} is on the meta device and has no weights"
            hint = "capture a model that has them, or a directory that holds them"
            raise SurgeryError("PSG207", message, hint)
        if self.folder is not None and are_here(self.folder):
            read_model_files(self.folder)  # refused if damaged: not all that is, transformers sees
        is_resized = self.build.vocabulary is not None
        config = copy.deepcopy(self.stored) if is_resized else self.module.config
        try:
            model, info = type(self.module).from_pretrained(
                self.origin,
                config=config,
                dtype=self.module.dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=self.build.labels is not None,
            )
        except (OSError, RuntimeError, SafetensorError) as error:
            message = f"no weights could be read from {self.origin}: {first_line(error)}"
            raise SurgeryError("PSG207", message) from error
        resize(model, self.build)
        kind, apart = type(model).__name__, tied_apart(self.module, model)
        if apart:
            raise SurgeryError(
                "PSG207",
                f"'{apart[0]}' and '{apart[1]}' are one weight of a {kind}, and {self.origin} has "
                "two that differ",
                "load the model, and capture what was loaded",
            )
        lost = {name for name, *_ in info.get("mismatched_keys", ())}
        self.missing = frozenset({*info["missing_keys"], *lost})
        self.notes = (
            *_unshared(info["unexpected_keys"], f"in {self.origin} that a {kind} leaves out"),
            *_unshared(self.missing, f"of a {kind} that {self.origin} has no values for"),
        )
        return model


def _unshared(names: Iterable[str], where: str) -> list[str]:
    """A note on tensors that only one side has."""
    found = sorted(names)
    return [f"{len(found)} tensors {where}, '{found[0]}' first"] if found else []


def open_source(spec: str, build: Build = FILES) -> Source:
    """The source that MODEL names: a directory or hub id, or ``package.module:factory``.

    A directory may hold what ``fold`` made of a factory's module. The source is of the class and
    has the labels that ``build`` wants; its vocabulary is for :meth:`Source.resized` to change.
    Raises PSG205 (no such model), PSG206 (a config of no known class), PSG208 (remote code), PSG218
    (no class of that name for it) and PSG227 (a program of torch.export).
    """
    refuse_program(spec)
    here = os.path.exists(spec)
    if (":" in spec and not here) or is_folded_module(spec):
        if build.kind or build.labels:
            what = build.kind or f"a model with {build.labels} labels"
            message = f"'{spec}' is called for the model and cannot be made {what}"
            raise SurgeryError("PSG218", message, "name a model's directory or hub id")
        module, inputs = folded_module(spec) if here else made_by(spec)
        return Source(module, os.path.abspath(spec) if here else spec, inputs=inputs)
    if not here and (not is_hub_id(spec) or _is_nearly_here(spec)):
        raise SurgeryError("PSG205", f"no model at '{spec}'", _nearby(spec))
    if here and not os.path.isfile(os.path.join(spec, "config.json")):
        message = f"'{spec}' is not a model directory: it has no config.json"
        raise SurgeryError("PSG205", message, _around(spec))
    with quiet():
        model = _outline(spec, build)
    # absolute, since a saved surgery names its base and is used from other directories too
    changed = replace(FILES, kind=build.kind, labels=build.labels)
    return Source(model, os.path.abspath(spec) if here else spec, changed)


def _outline(spec: str, build: Build) -> PreTrainedModel:
    """The model of a directory or hub id, on meta."""
    config = _config(spec)
    if getattr(config, "quantization_config", None):
        raise quantised(f"'{spec}'")
    if config.dtype is None:
        config.dtype = _stored_dtype(Path(spec))
    if build.kind is not None:
        config.architectures = [class_named(build.kind, config).__name__]
    if build.labels is not None:
        config.num_labels = build.labels
    model = build_on_meta(config)
    _read_generation_config(model, spec)
    untie_as_stored(model, Path(spec))
    return model


def check_plain(module: nn.Module) -> None:
    """Refuse a live module with weights of a quantiser's own kind. PSG215."""
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "quant_state") or hasattr(parameter, "SCB"):
            raise quantised(f"'{name}' ({type(parameter).__name__})")


def quantised(what: str) -> SurgeryError:
    """The refusal of a model that is quantised already."""
    hint = "capture the model that was quantised, and apply the rule `nf4` or `qlora` to it"
    return SurgeryError("PSG215", f"{what} is quantised already", hint)


def build_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config, in eval mode, with shapes and names but no memory for its weights.

    Raises PSG206 if the config's values make no model.
    """
    kind = model_class(config)
    try:
        with torch.device("meta"):
            model = kind._from_config(config, dtype=config.dtype or torch.float32)
    except CONFIG_ERRORS as error:
        message = f"this config makes no {kind.__name__}: {first_line(error)}"
        raise SurgeryError("PSG206", message) from error
    return model.eval()


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class a config names, or the base model of its type. PSG206 if there is none."""
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    try:
        return transformers.AutoModel._model_mapping[type(config)]
    except KeyError:
        message = f"transformers has no model class for '{config.model_type}'"
        raise SurgeryError("PSG206", message) from None


def _config(spec: str) -> PreTrainedConfig:
    file = Path(spec) / "config.json"
    if os.path.isfile(file):  # a path's own is_file() raises for a name that is too long
        raw = _read_json(file)
        known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
        if "auto_map" in raw:
            raise SurgeryError(
                "PSG208",
                f"'{spec}' needs Python code that comes with it ({', '.join(raw['auto_map'])})",
                "import that code yourself and capture the live model",
            )
        kind = raw.get("model_type")
        if not isinstance(kind, str) or kind not in known:
            hint = did_you_mean(str(kind), known) if kind else "config.json names no model_type"
            raise SurgeryError("PSG206", f"'{spec}' has an unknown model_type: {kind!r}", hint)
    try:
        return AutoConfig.from_pretrained(spec)
    except OSError as error:
        message = f"no model at '{spec}', and on the hub: {first_line(error)}"
        raise SurgeryError("PSG205", message) from error
    except CONFIG_ERRORS as error:
        message = f"the config of '{spec}' is no valid one: {first_line(error)}"
        raise SurgeryError("PSG206", message) from error


def _read_generation_config(model: PreTrainedModel, spec: str) -> None:
    """Give the model its settings for generation, as ``from_pretrained`` does. PSG206."""
    if not model.can_generate():
        return
    names = ("generation_config", "from_auto_class", "from_pipeline", "cache_dir", "proxies")
    unset = dict.fromkeys((*names, "token", "revision"))
    off = dict.fromkeys(("force_download", "local_files_only", "trust_remote_code"), False)
    try:
        model.adjust_generation_fn(**unset, **off, pretrained_model_name_or_path=spec, subfolder="")
    except CONFIG_ERRORS as error:
        message = f"the generation config of '{spec}' is no valid one: {error}"
        raise SurgeryError("PSG206", message) from error


def _stored_dtype(directory: Path) -> torch.dtype | None:
    """The first floating dtype in a directory's weights: their header is read, no weight is."""
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.offset_keys():
                    dtype = DTYPES.get(stored.get_slice(name).get_dtype())
                    if dtype in FLOATS:
                        return dtype
        except (OSError, SafetensorError):
            return None  # read again, and reported, when the weights are wanted
    return None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise SurgeryError("PSG205", f"{file} cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise SurgeryError("PSG205", f"{file} holds no JSON object")
    return raw


def _nearby(spec: str) -> str:
    """Hint that names directories near a path that does not exist."""
    parent = Path(spec).parent
    if not os.path.isdir(parent):
        return f"there is no directory '{parent}'"
    names = [entry.name for entry in parent.iterdir() if (entry / "config.json").is_file()]
    if not names:
        return f"'{parent}' holds no model's directory (one with a config.json)"
    return did_you_mean(Path(spec).name, names)


def _around(spec: str) -> str:
    """Hint on what a path holds that is no model directory."""
    path = Path(spec)
    if path.is_file():
        inside = (path.parent / "config.json").is_file()
        return f"give the directory itself: '{path.parent}'" if inside else "it is a file"
    names = sorted(entry.name for entry in path.iterdir() if (entry / "config.json").is_file())
    return f"it holds {', '.join(names[:5])}" if names else "its files are those of no model"


def _is_nearly_here(spec: str) -> bool:
    """Whether a directory of nearly this name exists: then no hub is asked for a misspelt path."""
    parent = Path(spec).parent
    names = [entry.name for entry in parent.iterdir()] if os.path.isdir(parent) else []
    return closest(Path(spec).name, names) is not None
