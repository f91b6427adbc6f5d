"""An operated model in transformers' Trainer and in accelerate, as any model is.

The oracles are peft in the same Trainer, and the same training without an interruption.
"""

from __future__ import annotations

import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import peftsurgery as ps
from peftsurgery.surgery.model.operated import OperatedModel
from tests.parity.models import SMALL, VOCABULARY, base, captured

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Rows(Dataset[dict[str, Tensor]]):
    """Sequences of tokens that are their own labels."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, VOCABULARY, (7,), generator=generator)
        return {"input_ids": ids, "labels": ids}


def trainer(model: Any, folder: Path, callbacks: Any = (), **arguments: Any) -> Trainer:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 3e-3,
        "save_steps": 3,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    told = TrainingArguments(str(folder), **{**settings, **arguments})
    return Trainer(
        model=model,
        args=told,
        train_dataset=Rows(),
        eval_dataset=Rows(),
        callbacks=list(callbacks),
    )


def logged(run: Trainer, key: str = "loss") -> list[float]:
    return [float(entry[key]) for entry in run.state.log_history if key in entry]


def adapted(name: str = "gpt2", rules: str = "lora_qv", **settings: Any) -> OperatedModel:
    graph = captured(name)  # which draws numbers the first time
    torch.manual_seed(5)
    return ps.apply(graph, rules, **settings)


@pytest.mark.slow
def test_losses_are_pefts_in_the_same_trainer(tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=list(SMALL["llama"].targets))
    theirs = get_peft_model(base("llama"), config)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = ps.from_peft(captured("llama"), tmp_path / "adapter")
    runs = [
        trainer(theirs, tmp_path / "theirs", label_names=["labels"]),
        trainer(ours, tmp_path / "ours"),
    ]
    for run in runs:
        run.train()
    assert logged(runs[1]) == pytest.approx(logged(runs[0]), abs=1e-5)
    evaluated = [logged(run, "eval_loss") for run in runs]
    assert evaluated[1] == pytest.approx(evaluated[0], abs=1e-5)
    assert len(evaluated[1]) == 2


@pytest.mark.slow
def test_a_checkpoint_holds_what_was_trained_and_is_resumed_exactly(tmp_path: Path) -> None:
    model = adapted()
    whole = trainer(model, tmp_path)
    whole.train()
    saved = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert saved.keys() == model.learnt().keys(), "the tied embeddings of the base are not there"
    assert all(torch.equal(value, model.learnt()[name]) for name, value in saved.items())

    shutil.rmtree(tmp_path / "checkpoint-6")
    again = adapted()
    resumed = trainer(again, tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed) == logged(whole)
    assert all(torch.equal(p, again.learnt()[name]) for name, p in model.learnt().items())


def test_a_state_dict_is_read_strictly_and_leaves_the_base_alone() -> None:
    model, other = adapted(), adapted()
    for parameter in model.learnt().values():
        parameter.data.add_(1.0)
    state = model.state_dict()
    result = other.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert all(torch.equal(p, other.learnt()[name]) for name, p in model.learnt().items())
    third = deepcopy(adapted())
    third.load_state_dict(state)
    assert all(torch.equal(p, third.learnt()[name]) for name, p in model.learnt().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(dict(list(state.items())[1:]))


@pytest.mark.slow
@pytest.mark.parametrize("old", [False, True])
def test_gradient_checkpointing_gives_the_same_training(old: bool, tmp_path: Path) -> None:
    key = "gradient_checkpointing" if old else "activation_checkpointing"
    model = adapted("llama")
    runs = [
        trainer(adapted("llama"), tmp_path / "plain"),
        trainer(model, tmp_path / key, **{key: True}),
    ]
    for run in runs:
        run.train()
    assert model.is_gradient_checkpointing
    assert logged(runs[1]) == logged(runs[0])


def test_gradient_checkpointing_as_transformers_asks_for_it() -> None:
    model = adapted("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.is_gradient_checkpointing
    model.activation_checkpointing_enable(every_n_layers=2)
    layers = model.get_submodule("model.layers")
    assert [layer.checkpointing for layer in layers.children()] == [True, False]
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    with pytest.raises(ps.SurgeryError, match=r"PSG214.*use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


@pytest.mark.slow
def test_mixed_precision_trains_nearly_the_same(tmp_path: Path) -> None:
    runs = [
        trainer(adapted("llama"), tmp_path / "full"),
        trainer(adapted("llama"), tmp_path / "mixed", bf16=True),
    ]
    for run in runs:
        run.train()
    assert logged(runs[1]) == pytest.approx(logged(runs[0]), abs=0.02)
    assert {p.dtype for p in runs[1].model.parameters()} == {torch.float32}


@pytest.mark.slow
def test_ranks_are_allocated_by_a_callback_and_resumed_in_the_middle(tmp_path: Path) -> None:
    settings = {"rank": 4, "target": 2, "initial_steps": 1, "final_steps": 2}
    model = adapted("llama", "adalora", **settings)
    callback = ps.AllocateRanks(model)
    whole = trainer(model, tmp_path, [callback], max_steps=12)
    whole.train()
    assert callback.allocator is not None
    kept = callback.allocator.kept
    assert sum(int(mask.sum()) for mask in kept.values()) == 2 * len(kept)

    for step in (6, 9, 12):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-3")
    again = adapted("llama", "adalora", **settings)
    second = ps.AllocateRanks(again)
    resumed = trainer(again, tmp_path, [second], max_steps=12)
    resumed.train(resume_from_checkpoint=True)
    assert second.allocator is not None
    assert second.allocator.kept.keys() == kept.keys()
    assert all(torch.equal(mask, second.allocator.kept[name]) for name, mask in kept.items())
    assert logged(resumed) == logged(whole)


def test_accelerate_prepares_saves_and_loads(tmp_path: Path) -> None:
    model = adapted("llama", "adalora", rank=4, target=2, total_steps=8)
    optimizer = torch.optim.AdamW(ps.lora_plus(model, 3e-3, ratio=4.0))
    accelerator = Accelerator(cpu=True)
    prepared, optimizer, loader = accelerator.prepare(
        model, optimizer, DataLoader(Rows(), batch_size=4)
    )
    allocator = ps.RankAllocator(model)
    accelerator.register_for_checkpointing(allocator)
    before = [p.clone() for p in model.parameters() if not p.requires_grad]
    ends: list[dict[str, Tensor]] = []
    for again in (False, True):
        if again:
            accelerator.load_state(str(tmp_path))
        for step, batch in enumerate(loader):
            if step < 4 and again:
                continue
            if step == 4 and not again:
                accelerator.save_state(str(tmp_path))
            accelerator.backward(prepared(**batch).loss)
            optimizer.step()
            allocator.step(step)
            optimizer.zero_grad()
        ends.append(deepcopy(model.learnt()))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert all(torch.equal(*pair) for pair in zip(before, frozen, strict=True))


def test_what_a_trainer_asks_a_model_for() -> None:
    model, original = adapted("llama"), captured("llama").source.module
    for name in ("config", "device", "dtype", "main_input_name", "loss_type"):
        assert getattr(model, name) == getattr(original, name), name
    assert not hasattr(model, "accepts_loss_kwargs")
    assert type(model).__name__ == type(original).__name__
    assert isinstance(deepcopy(model), OperatedModel)
