"""The models of the sweep: every class of transformers' mappings, small and with random weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from peftsurgery.capture.inputs import BATCH, LENGTH, example_inputs
from tools.bench.sweep_configs import FILLED, MIXED, REPAIRED, SHORT, SMALL, SPECIAL

# What originals that do not fit, and faults, end in.
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    StrictDataclassError,
)

# The mappings by the sweep's names for them, each with the class that makes a model of a config.
MAPPINGS: dict[str, tuple[str, str]] = {
    "causal": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM"),
    "masked": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "AutoModelForMaskedLM"),
    "seq2seq": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "AutoModelForSeq2SeqLM"),
    "image": ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "AutoModelForImageClassification"),
    "base": ("MODEL_MAPPING_NAMES", "AutoModel"),
}


def all_models() -> list[str]:
    """Every model as ``mapping:type``; of the base models those that no other mapping has."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    made: list[str] = []
    known: set[str] = set()
    for mapping, (names, _) in MAPPINGS.items():
        kinds = [kind for kind in getattr(modeling_auto, names) if kind in CONFIG_MAPPING]
        made += [f"{mapping}:{k}" for k in kinds if mapping != "base" or k not in known]
        known.update(kinds)
    return made


def fit_model(name: str) -> tuple[Any, dict[str, Any] | None, dict[str, Any], Any]:
    """A small model that runs: heads share keys where they may.

    With the inputs to capture it with, or None if the capture makes some; others, and what it
    returns for them. Raises what the original fails with, if it does so either way.
    """
    for kv_heads in (2, 4):
        try:
            model = small_model(name, kv_heads)
            model.config.use_cache = False
            given = GIVEN.get(name.rpartition(":")[2])
            inputs = unseen_inputs(model) if given is None else given(model.config, 3, 11)
            example = None if given is None else given(model.config, 2, 8)
            with torch.no_grad():
                return model, example, inputs, model(**inputs)
        except FAILURES:
            if kv_heads == 4:
                raise
    raise AssertionError


def _text_and_sound(config: Any, batch: int, size: int) -> dict[str, torch.Tensor]:
    sound = torch.randn(batch, 1, config.audio_config.spec_size, config.audio_config.num_mel_bins)
    ids = torch.randint(5, 90, (batch, size))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "input_features": sound}


def _mels(config: Any, batch: int, size: int) -> dict[str, torch.Tensor]:
    frames = 8 * size
    bins = torch.randn(batch, frames, config.input_feat_size)
    return {"audio_mel": bins, "audio_mel_mask": torch.zeros(batch, frames, dtype=torch.bool)}


GIVEN: dict[str, Callable[[Any, int, int], dict[str, torch.Tensor]]] = {
    "clap": _text_and_sound,
    "gemma3n_audio": _mels,
}
"""Inputs of models whose capture asks for some, for a batch and a size."""


def small_model(name: str, kv_heads: int = 2) -> Any:
    """The small model ``mapping:type`` in eval mode, its parameters moved off zero and one."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    mapping, _, kind = name.rpartition(":")
    made_by = getattr(transformers, MAPPINGS[mapping or "base"][1])
    torch.manual_seed(0)
    config_class = CONFIG_MAPPING[kind]
    values = REPAIRED.get(kind)
    if values is None:
        values = {**small_values(config_class, kv_heads), **MIXED.get(kind, {})}
    config = config_class(**values)
    if mapping == "masked" and hasattr(config, "is_decoder"):
        config.is_decoder = False
    config.architectures = config.architectures or []  # asked for where a type has two classes
    model = _part_of(config, mapping, kind) or made_by.from_config(config)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def _part_of(config: Any, mapping: str, kind: str) -> Any:
    """A model of a part of a config, for classes that take no other; None for all others."""
    import transformers
    from transformers.models.auto import modeling_auto

    known = getattr(modeling_auto, MAPPINGS[mapping or "base"][0]).get(kind)
    made_by: Any = getattr(transformers, known, None) if isinstance(known, str) else None
    wanted = getattr(made_by, "config_class", None)
    if wanted is None or isinstance(config, wanted):
        return None
    parts = [getattr(config, name) for name in config.sub_configs]
    return next((made_by._from_config(part) for part in parts if isinstance(part, wanted)), None)


def small_values(config_class: Any, kv_heads: int) -> dict[str, Any]:
    """Small values of a config's sizes, also of those of the configs within it."""
    default = config_class()
    told = default.to_dict()
    accepted = inspect.signature(config_class.__init__).parameters
    small = {**SMALL, "num_key_value_heads": kv_heads, "num_kv_heads": kv_heads}
    values: dict[str, Any] = {
        name: size
        for name, size in small.items()
        if type(told.get(name)) is int or (name in FILLED and told.get(name, 0) is None)
    }
    values |= {k: v for k, v in SPECIAL.items() if told.get(k) is not None}
    lists = {name: told.get(name) for name in SHORT}
    values |= {k: [min(n, 2) for n in v] for k, v in lists.items() if isinstance(v, list | tuple)}
    if isinstance(told.get("image_size"), list | tuple):
        values["image_size"] = [64, 64]
    for name in getattr(config_class, "sub_configs", {}):
        inner = getattr(default, name, None)
        if inner is not None and (name in accepted or "kwargs" in accepted):
            values[name] = small_values(type(inner), kv_heads)
            values[name] |= {"model_type": inner.model_type} if inner.model_type else {}
    return values


def unseen_inputs(model: Any) -> dict[str, Any]:
    """Random inputs, larger than the examples a capture makes for itself."""
    torch.manual_seed(2)
    examples = example_inputs(model)
    larger = {name: torch.cat([v, v[: len(v) // BATCH]]) for name, v in examples.items()}
    if model.main_input_name == "input_ids":
        larger = {
            name: torch.cat([v, v[:, :3]], dim=1) if v.dim() == 2 else v
            for name, v in larger.items()
        }
        if "input_features" in larger:  # of each of the three tokens more
            sound = larger["input_features"]
            more = sound[..., : 3 * sound.shape[-1] // LENGTH]
            larger["input_features"] = torch.cat([sound, more], dim=-1)
    for name, value in larger.items():
        if value.is_floating_point():
            larger[name] = torch.randn_like(value)
        elif not name.endswith(("mask", "shapes")):
            larger[name] = torch.randint_like(value, 5, 90)
    return larger
