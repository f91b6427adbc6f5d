"""The models of the sweep: every class of transformers' mappings, small and with random weights."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from peftsurgery.capture.inputs import example_inputs
from tools.bench.sweep_configs import REPAIRED, SMALL, SPECIAL

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


def small_model(name: str) -> Any:
    """The small model ``mapping:type`` in eval mode, its parameters moved off zero and one."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    mapping, _, kind = name.rpartition(":")
    made_by = getattr(transformers, MAPPINGS[mapping or "base"][1])
    torch.manual_seed(0)
    config_class = CONFIG_MAPPING[kind]
    config = config_class(**(REPAIRED[kind] if kind in REPAIRED else small_values(config_class)))
    if mapping == "masked" and hasattr(config, "is_decoder"):
        config.is_decoder = False
    model = made_by.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def small_values(config_class: Any) -> dict[str, Any]:
    """Small values of a config's sizes, also of those of the configs within it."""
    default = config_class()
    accepted = inspect.signature(config_class.__init__).parameters
    values: dict[str, Any] = {k: v for k, v in SMALL.items() if is_size(default, k)}
    values |= {k: v for k, v in SPECIAL.items() if getattr(default, k, None) is not None}
    for name in getattr(config_class, "sub_configs", {}):
        inner = getattr(default, name, None)
        if inner is not None and (name in accepted or "kwargs" in accepted):
            values[name] = small_values(type(inner))
            values[name] |= {"model_type": inner.model_type} if inner.model_type else {}
    return values


def is_size(config: Any, name: str) -> bool:
    """Whether a config has a number of that name."""
    found = getattr(config, name, None)
    return isinstance(found, int) and not isinstance(found, bool)


def unseen_inputs(model: Any) -> dict[str, Any]:
    """Inputs larger than the examples a capture makes for itself."""
    larger = {name: torch.cat([value, value[:1]]) for name, value in example_inputs(model).items()}
    if model.main_input_name == "input_ids":
        larger = {
            name: torch.cat([v, v[:, :3]], dim=1) if v.dim() == 2 else v
            for name, v in larger.items()
        }
    return larger
