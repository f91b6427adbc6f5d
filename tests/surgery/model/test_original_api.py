"""What a model is, asked in every way that transformers, accelerate, peft and trl ask it.

The oracle is the original: an operated model gives its answer. Each question names where it is
asked (transformers 5.23, accelerate 1.x, peft 0.21, trl 1.16).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import infer_auto_device_map
from accelerate.utils.modeling import check_tied_parameters_in_config, find_tied_parameters
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GenerationMixin,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_pt_utils import get_module_class_from_name, get_parameter_names
from transformers.trainer_utils import unwrap_peft_model
from transformers.utils.generic import can_return_loss, find_labels

import peftsurgery as ps
from tests.parity.models import SMALL, captured

NAMES = ("llama", "gpt2", "bert", "t5")
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
Ask = Callable[[Any], Any]


def path_of(model: nn.Module, part: nn.Module | None) -> str | None:
    """The name of a module within a model; modules of two models are compared by it."""
    return next((name for name, module in model.named_modules() if module is part), None)


def plain_parameters(model: nn.Module, names: list[str]) -> list[str]:
    """Those that the original has too."""
    return [name for name in names if ".lora_qv." not in name]


def disable_dropout(model: nn.Module) -> list[str]:
    """trl's ``disable_dropout_in_model``: which modules it finds."""
    return [name for name, part in model.named_modules() if isinstance(part, nn.Dropout)]


def attribute(name: str) -> Ask:
    return lambda model: getattr(model, name, "there is none")


ATTRIBUTES = {
    "_keys_to_ignore_on_save": "Trainer._issue_warnings_after_load",
    "_keys_to_ignore_on_load_missing": "modeling_utils",
    "_no_split_modules": "Trainer with fsdp, accelerate.infer_auto_device_map",
    "_skip_keys_device_placement": "accelerate.dispatch_model",
    "_tied_weights_keys": "accelerate.fsdp_utils",
    "all_tied_weights_keys": "accelerate.utils.modeling",
    "_supports_sdpa": "modeling_utils",
    "_supports_attention_backend": "peft, modeling_utils",
    "_supports_context_parallel": "accelerate.big_modeling",
    "_tp_plan": "Trainer, accelerate.utils.other",
    "_tp_size": "Trainer.get_tp_size",
    "tp_size": "Trainer._build_accelerator_args, accelerate",
    "_device_mesh": "accelerate",
    "_hf_peft_config_loaded": "Trainer, modeling_utils, pipelines",
    "accepts_loss_kwargs": "Trainer",
    "base_model_prefix": "peft.PeftModel, trl.models",
    "config_class": "integrations",
    "generation_config": "Seq2SeqTrainer, trl, pipelines",
    "hf_device_map": "Trainer, trl.SFTTrainer, accelerate",
    "hf_quantizer": "trainer_utils.validate_quantization_for_training",
    "input_modalities": "pipelines.base",
    "is_loaded_in_4bit": "trl, Trainer",
    "is_parallelizable": "Trainer",
    "is_distributed_loading_by_transformers": "Trainer",
    "is_quantized": "trainer_utils.validate_quantization_for_training",
    "loss_function": "Trainer (which loss a model computes)",
    "loss_type": "Trainer",
    "main_input_name": "Trainer.floating_point_ops, generation",
    "model_tags": "Trainer.create_model_card",
    "name_or_path": "integrations, trl",
    "output_modalities": "pipelines.base",
    "peft_config": "trl",
    "quantization_method": "Trainer, accelerate",
    "supports_gradient_checkpointing": "modeling_utils",
    "warnings_issued": "trl",
    "_auto_class": "pipelines",
}
QUESTIONS: dict[str, Ask] = {
    "class name: Trainer's MODEL_MAPPING_NAMES, pipelines.check_model_type, modelcard, peft": (
        lambda model: (type(model).__name__, model.__class__.__module__)
    ),
    "_get_name: Trainer.compute_loss with label_smoothing_factor": lambda model: model._get_name(),
    "isinstance: Trainer._save, Trainer._build_accelerator_args, wandb, peft.get_model_status": (
        lambda model: (isinstance(model, PreTrainedModel), isinstance(model, GenerationMixin))
    ),
    "getmro: accelerate.utils.modeling.check_tied_parameters_in_config": (
        check_tied_parameters_in_config
    ),
    "ties: accelerate.utils.modeling.find_tied_parameters": find_tied_parameters,
    "config: everywhere": lambda model: model.config.to_dict(),
    "signature: Trainer._set_signature_columns_if_needed, trl": (
        lambda model: str(inspect.signature(model.forward))
    ),
    "signature of the class: trl.trainer.utils": (
        lambda model: str(inspect.signature(type(model).forward))
    ),
    "labels: Trainer (find_labels, can_return_loss)": (
        lambda model: (find_labels(type(model)), can_return_loss(type(model)))
    ),
    "unwrapping: Trainer, accelerate.extract_model_from_parallel": (
        lambda model: (
            unwrap_peft_model(model) is model,
            Accelerator(cpu=True).unwrap_model(model) is model,
        )
    ),
    "inner model: peft, wandb, trl": lambda model: path_of(model, model.base_model),
    "input embeddings: peft, neftune, trl": (
        lambda model: path_of(model, model.get_input_embeddings())
    ),
    "output embeddings: peft's all-linear": (
        lambda model: path_of(model, model.get_output_embeddings())
    ),
    "encoder and decoder: generation, peft": (
        lambda model: [path_of(model, model.get_encoder()), path_of(model, model.get_decoder())]
    ),
    "classes of parts: accelerate's device maps, FSDP's wrapping by class": (
        lambda model: {
            name: type(part).__name__
            for name, part in model.named_modules()
            if "lora_qv" not in name
        }
    ),
    "class by its name: Trainer with fsdp": (
        lambda model: [
            get_module_class_from_name(model, name).__name__
            for name in sorted(model._no_split_modules or [])
            if get_module_class_from_name(model, name) is not None
        ]
    ),
    "weight decay: Trainer.get_decay_parameter_names": (
        lambda model: plain_parameters(model, get_parameter_names(model, [nn.LayerNorm], ["bias"]))
    ),
    "embeddings by class: Trainer.create_optimizer with bitsandbytes": (
        lambda model: [n for n, part in model.named_modules() if isinstance(part, nn.Embedding)]
    ),
    "dropouts by class: trl.disable_dropout_in_model": disable_dropout,
    "linears by class: peft's all-linear, quantisers": (
        lambda model: [n for n, part in model.named_modules() if isinstance(part, nn.Linear)]
    ),
    "sizes of parts: peft, quantisers": (
        lambda model: {
            n: (part.in_features, part.out_features)
            for n, part in model.named_modules()
            if isinstance(part, nn.Linear)
        }
    ),
    "device map: accelerate.infer_auto_device_map": (
        lambda model: set(
            infer_auto_device_map(
                model, {"cpu": "1GB"}, no_split_module_classes=list(model._no_split_modules or [])
            ).values()
        )
    ),
    "can_generate: pipelines, Trainer": lambda model: model.can_generate(),
    "logits to keep: assisted generation": lambda model: model._supports_logits_to_keep(),
    "default cache: generation": lambda model: model._supports_default_dynamic_cache(),
    "decoder's inputs: DataCollatorForSeq2Seq": lambda model: (
        model.prepare_decoder_input_ids_from_labels(IDS).tolist()
        if hasattr(model, "prepare_decoder_input_ids_from_labels")
        else None
    ),
    "remote code: pipelines, hub": lambda model: (model.is_remote_code(), model.is_custom_code()),
    "is_backend_compatible: integrations": lambda model: model.is_backend_compatible(),
    **{f"{name}: {where}": attribute(name) for name, where in ATTRIBUTES.items()},
}


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """An operated model and its original."""
    model = captured(request.param)
    return ps.apply(model, "lora_qv"), model.source.module


@pytest.mark.parametrize("question", QUESTIONS)
def test_what_libraries_ask_a_model_is_answered_as_by_the_original(
    pair: tuple[Any, Any], question: str
) -> None:
    operated, original = pair
    assert answer(QUESTIONS[question], operated) == answer(QUESTIONS[question], original)


def answer(ask: Ask, model: Any) -> Any:
    """What a question gives, an error included: there are things that some models have not."""
    try:
        return ask(model)
    except AttributeError as error:
        return str(error)


def test_parts_answer_as_the_originals_parts_do(pair: tuple[Any, Any]) -> None:
    operated, original = pair
    for name, part in original.named_modules():
        mine = operated.get_submodule(name)
        assert isinstance(mine, type(part))
        for key, value in vars(part).items():
            if isinstance(value, int | float | str | bool) and not key.startswith("_"):
                assert getattr(mine, key) == value, f"{name}.{key}"


def test_what_would_change_a_captured_model_unseen_is_refused(pair: tuple[Any, Any]) -> None:
    operated, _ = pair
    inner = [part for part in operated.modules() if isinstance(part, PreTrainedModel)][1]
    for refused in (
        lambda: operated.resize_token_embeddings(70),
        lambda: operated.set_input_embeddings(nn.Embedding(70, 32)),
        lambda: operated.add_adapter(LoraConfig()),
        lambda: operated.set_attn_implementation("eager"),
        lambda: type(operated).from_pretrained("somewhere"),
        lambda: operated.push_to_hub("somewhere"),
        lambda: operated.save_pretrained("somewhere", push_to_hub=True),
        lambda: inner.save_pretrained("somewhere"),
        lambda: inner.gradient_checkpointing_enable(),
    ):
        with pytest.raises(ps.SurgeryError, match="PSG216"):
            refused()


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_label_smoothing_sees_the_task_as_with_the_original(name: str, tmp_path: Path) -> None:
    model = captured(name)
    original = model.source.module
    wrapped = get_peft_model(
        SMALL[name].build(),
        LoraConfig(target_modules=list(SMALL[name].targets), init_lora_weights=True),
    )
    batch = {"input_ids": IDS, "labels": IDS + 3}
    if name == "t5":
        batch["decoder_input_ids"] = original._shift_right(IDS + 3)
    losses = [
        smoothed_loss(each, batch, tmp_path)
        for each in (original, ps.apply(model, "lora_qv"), wrapped)
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert losses[2] == pytest.approx(losses[0], abs=1e-6)


@pytest.fixture(scope="module")
def classifier() -> tuple[Any, Any]:
    """An operated classifier with dropout, and its original."""
    settings = {**SMALL["bert"].settings, "num_labels": 5, "attention_probs_dropout_prob": 0.0}
    original = BertForSequenceClassification(BertConfig(**settings)).eval()
    return ps.apply(ps.capture(original), "lora_qv"), original


def test_label_smoothing_of_a_classifier(classifier: tuple[Any, Any], tmp_path: Path) -> None:
    operated, original = classifier
    batch = {"input_ids": IDS, "labels": torch.tensor([1, 4])}
    assert smoothed_loss(operated, batch, tmp_path) == pytest.approx(
        smoothed_loss(original, batch, tmp_path), abs=1e-6
    )


def smoothed_loss(model: Any, batch: dict[str, Tensor], folder: Path) -> float:
    """The loss that a Trainer computes with label smoothing."""
    arguments = TrainingArguments(
        str(folder), label_smoothing_factor=0.1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    with torch.no_grad():
        return float(Trainer(model=model, args=arguments).compute_loss(model.eval(), dict(batch)))


def test_a_dropout_switched_off_through_its_module_is_off(classifier: tuple[Any, Any]) -> None:
    operated, original = deepcopy(classifier[0]).train(), classifier[1]
    assert not torch.equal(operated(IDS).logits, operated(IDS).logits)
    for part in operated.modules():  # trl's disable_dropout_in_model
        if isinstance(part, nn.Dropout):
            part.p = 0
    assert torch.equal(operated(IDS).logits, original(IDS).logits)


def test_a_captured_module_of_ones_own_keeps_its_methods_and_settings() -> None:
    class Scaled(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(3, 3), nn.ReLU())
            self.scale, self.seen = 2.0, ["a"]

        def halves(self) -> float:
            return self.scale / 2

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = super().forward(x) * self.scale
            return result

    model = Scaled()
    captured_model: Any = ps.capture(model, inputs=(torch.ones(2, 3),))
    assert isinstance(captured_model, Scaled)
    assert captured_model.halves() == 1.0
    assert len(captured_model) == 2
    assert isinstance(captured_model[0], nn.Linear)
    captured_model.seen.append("b")
    assert model.seen == ["a"]
    assert torch.equal(captured_model(torch.ones(2, 3)), model(torch.ones(2, 3)))


def test_a_class_that_cannot_be_inherited_is_answered_for_by_name() -> None:
    class Closed(type):
        def __new__(cls, name: str, bases: tuple[type, ...], content: dict[str, Any]) -> Any:
            if any(isinstance(kind, Closed) for kind in bases):
                raise TypeError("final")
            return super().__new__(cls, name, bases, content)

    class Final(nn.Module, metaclass=Closed):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.width = nn.Linear(3, 3), 3

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.linear(x)
            return result

    model = Final()
    captured_model: Any = ps.capture(model, inputs=(torch.ones(2, 3),))
    assert type(captured_model).__name__ == "Final"
    assert captured_model.width == 3
    assert torch.equal(captured_model(torch.ones(2, 3)), model(torch.ones(2, 3)))
