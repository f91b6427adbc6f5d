"""One method trained on MiniLM, in this process: here, or by peft."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, BitsAndBytesConfig

import peftsurgery as ps
from peftsurgery.errors import SurgeryError
from peftsurgery.language.rule_file import RuleFile
from tools.bench.capture import peak_gb
from tools.bench.recipes import FULL, RECIPES, Recipe
from tools.bench.task import STEPS, Task, Trained
from tools.story.minilm import find_model

Row = dict[str, Any]
PROBE = 64  # texts on which a folded model is compared with the operated one


def ours(name: str, folder: str) -> Row:
    """Train a method of the table with this package."""
    task, recipe = _start(folder), RECIPES[name]
    base = AutoModel.from_pretrained(find_model()).eval()
    if name == FULL:
        return _row(task, base, task.train(base, base.parameters(), recipe.rate))
    operated = _operate(name, recipe, base, task)
    groups: Any = [p for p in operated.parameters() if p.requires_grad]
    if name == "lora_plus":
        groups = ps.lora_plus(operated, recipe.rate)
    has_ranks = any(cut.rule.ranks is not None for cut in operated.cuts)
    after = ps.RankAllocator(operated).step if has_ranks else _nothing
    trained = task.train(operated, groups, recipe.rate, operated.penalty, after)
    return {**_row(task, operated, trained), "fold": _fold(task, operated)}


def theirs(name: str, folder: str) -> Row:
    """Train a method of the table with peft."""
    import peft

    task, recipe = _start(folder), RECIPES[name]
    assert recipe.peft is not None
    kind, settings = recipe.peft
    loading: Row = {}
    if name == "qlora":
        loading["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    base = AutoModel.from_pretrained(find_model(), **loading)
    given = {"task_type": "FEATURE_EXTRACTION", **settings}
    if kind == "AdaLoraConfig":
        schedule = RECIPES["adalora"].settings
        given |= {"total_step": STEPS, "tinit": schedule["initial_steps"]}
        given |= {"tfinal": schedule["final_steps"]}
    model = peft.get_peft_model(base, getattr(peft, kind)(**given))
    after = model.base_model.update_and_allocate if kind == "AdaLoraConfig" else _nothing
    parameters = [p for p in model.parameters() if p.requires_grad]
    return _row(task, model, task.train(model, parameters, recipe.rate, after=after))


def _nothing(step: int) -> None:
    pass


def _start(folder: str) -> Task:
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    return Task(Path(folder))


def _operate(name: str, recipe: Recipe, base: nn.Module, task: Task) -> Any:
    """The method on the captured model; what it builds on is trained first."""
    model: Any = ps.capture(base)
    for number, adapter in enumerate(recipe.before):
        model = ps.apply(model, "pfeiffer", name=adapter)
        with model.only(adapter):
            own = [p for p in model.parameters() if p.requires_grad]
            rate = RECIPES["pfeiffer"].rate
            share = task.learn[number :: len(recipe.before)]
            task.train(model, own, rate, learn=share, steps=STEPS // len(recipe.before))
        for parameter in own:
            parameter.requires_grad_(False)
    rules = [_without(ps.load_rules(rule), recipe.without) for rule in recipe.rules or (name,)]
    return ps.apply(model, rules, **recipe.settings)


def _without(file: RuleFile, outputs: tuple[str, ...]) -> RuleFile:
    """The rule file without the new values of these outputs."""
    rules = tuple(
        rule.model_copy(
            update={"rewrite": {n: e for n, e in rule.rewrite.items() if n not in outputs}}
        )
        for rule in file.rules
    )
    return file.model_copy(update={"rules": rules})


def _fold(task: Task, operated: Any) -> float | str:
    """How far the folded model's embeddings are from the operated one's, or why it has none."""
    texts = [text for text, _ in task.judge[:: max(len(task.judge) // PROBE, 1)]]
    try:
        folded = ps.fold(operated).eval()
    except SurgeryError as error:
        return error.code
    with torch.no_grad():
        return float((task.embed(folded, texts) - task.embed(operated, texts)).abs().max())


def _row(task: Task, model: nn.Module, trained: Trained) -> Row:
    peak = peak_gb()
    return {
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "accuracy": task.accuracy(model),
        "step_ms": trained.step_ms,
        "loss": trained.loss,
        "peak_gb": peak,
    }
