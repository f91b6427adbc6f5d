"""The rank allocator against peft's, step by step in one process, and on rules of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model

import peftsurgery as ps
from peftsurgery.surgery.model.operated import OperatedModel
from peftsurgery.training import Schedule
from tests.parity.models import SMALL, base, batch, captured

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
SCHEDULE = {"total_steps": 60, "initial_steps": 5, "final_steps": 10, "interval": 3}
OURS = {f"lora_{letter}.default": f"adalora.{letter}" for letter in "ABE"}
SETTINGS = {"rank": 6, "target": 3, "alpha": 8, **SCHEDULE}


def applied(name: str, **settings: Any) -> OperatedModel:
    rules = ps.load_rules("adalora")
    paths = captured(name).source.module.named_modules()
    chosen = [path for path, _ in paths if path.endswith(SMALL[name].targets)]
    where = type(rules.rules[0].where)(paths=tuple(chosen))
    rule = rules.rules[0].model_copy(update={"where": where})
    file = rules.model_copy(update={"rules": (rule,)})
    torch.manual_seed(3)
    return ps.apply(captured(name), file, **{**SETTINGS, **settings}).train()


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)


def advance(
    model: OperatedModel, optimizer: torch.optim.Optimizer, allocator: ps.RankAllocator, step: int
) -> tuple[float, dict[str, list[bool]] | None]:
    """One step of a plain loop: the loss, and the masks if they were chosen anew."""
    loss = model(**batch(3, 6 + step % 3)).loss
    loss.backward()
    optimizer.step()
    chosen = allocator.step(step)
    optimizer.zero_grad()
    kept = None if chosen is None else {name: k.tolist() for name, k in chosen.items()}
    return loss.item(), kept


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "qwen3"])
def test_masks_are_pefts_at_every_allocation_of_sixty_steps(name: str) -> None:
    config = AdaLoraConfig(
        init_r=6,
        target_r=3,
        lora_alpha=8,
        tinit=5,
        tfinal=10,
        deltaT=3,
        total_step=60,
        target_modules=list(SMALL[name].targets),
    )
    theirs: Any = get_peft_model(base(name), config).train()
    ours = applied(name)
    for full, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            ours.get_parameter(our_name(full)).data.copy_(parameter.data)
    optimizers = optimizer_of(theirs), optimizer_of(ours)
    allocator, chosen = ps.RankAllocator(ours), 0
    for step in range(60):
        # what wraps the tuner leaves the penalty out unless the config has a task
        loss = theirs.base_model(**batch(3, 6 + step % 3)).loss
        loss.backward()
        optimizers[0].step()
        theirs.base_model.update_and_allocate(step)
        optimizers[0].zero_grad()
        own, kept = advance(ours, optimizers[1], allocator, step)
        assert own == pytest.approx(loss.item(), abs=1e-5)
        if kept is not None:
            pattern = theirs.peft_config["default"].rank_pattern
            assert kept == {our_name(full): mask for full, mask in pattern.items()}, step
            chosen += 1
    assert chosen == 16
    assert sum(int(mask.sum()) for mask in allocator.kept.values()) == 3 * len(allocator.kept)
    for full, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            mine = ours.get_parameter(our_name(full))
            torch.testing.assert_close(mine, parameter, rtol=0, atol=1e-5)


def our_name(full: str) -> str:
    ending = next(ending for ending in OURS if full.endswith(ending))
    return full.removeprefix("base_model.model.").removesuffix(ending) + OURS[ending]


@pytest.mark.parametrize("stop", [20, 54])
def test_a_training_resumed_in_the_middle_has_the_very_same_masks(
    stop: int, tmp_path: Path
) -> None:
    model = applied("llama")
    optimizer, allocator = optimizer_of(model), ps.RankAllocator(model)
    for step in range(stop):
        advance(model, optimizer, allocator, step)
    model.save(tmp_path)
    allocator.save(tmp_path)
    moments = optimizer.state_dict()

    again = ps.load(tmp_path, captured("llama")).train()
    resumed = ps.RankAllocator(again)
    resumed.load(tmp_path)
    assert resumed.last == stop - 1
    copy = optimizer_of(again)
    copy.load_state_dict(copied(moments))
    for step in range(stop, 60):
        expected = advance(model, optimizer, allocator, step)
        assert advance(again, copy, resumed, step) == expected
    assert all(torch.equal(p, again.get_parameter(n)) for n, p in model.learnt().items())


def copied(state: Any) -> Any:
    """A copy of an optimizer's state that shares nothing with it."""
    if isinstance(state, torch.Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    return [copied(value) for value in state] if isinstance(state, list) else state


RULES = """
name: rows
with: {size: 5, steps: 4}
rules:
  - match: linear
    where: {role: [attn.q, attn.v]}
    params:
      A: {shape: [size, in], init: normal(0.1)}
      B: {shape: [out, size], init: zeros}
    rewrite: y + linear(linear(x, A), B)
    fold: W + B @ A
    ranks: {axes: {A: 0, B: 1}, zero: B, target: 2, total: steps}
"""


def test_any_rule_with_ranks_can_be_allocated() -> None:
    model = ps.apply(captured("llama"), ps.parse_rules(RULES)).train()
    allocator = ps.RankAllocator(model)
    assert [allocator.budget(step) for step in range(6)] == [20, 13, 9, 8, 8, 8]
    optimizer = optimizer_of(model)
    for step in range(3):
        advance(model, optimizer, allocator, step)
    for name, kept in allocator.kept.items():
        assert torch.equal(model.get_parameter(name).any(0), kept)
    assert sum(int(kept.sum()) for kept in allocator.kept.values()) == 9


def test_nothing_is_taken_away_that_the_budget_has_room_for() -> None:
    model = applied("llama", rank=3, target=3)
    optimizer, allocator = optimizer_of(model), ps.RankAllocator(model)
    masks = [advance(model, optimizer, allocator, step)[1] for step in range(8)]
    assert all(all(map(all, kept.values())) for kept in masks if kept is not None)


def test_the_schedule_is_cubic_and_ends_at_the_target() -> None:
    schedule = Schedule(2, 100, 10, 20, 5, 0.85, 0.85)
    budgets = [schedule.budget(step, 80, 10) for step in range(100)]
    assert budgets[:11] == [80] * 11
    assert budgets[45] == 20 + int(60 / 8)
    assert budgets[80:] == [20] * 20
    assert sorted(budgets, reverse=True) == budgets
    assert [s for s in range(100) if schedule.chooses(s)] == list(range(15, 81, 5))


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"total_steps": 0}, "PSG322"),
        ({"initial_steps": 50}, "PSG322"),
        ({"interval": 0}, "PSG322"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(settings: dict[str, int], code: str) -> None:
    with pytest.raises(ps.SurgeryError) as refusal:
        ps.RankAllocator(applied("llama", **settings))
    assert refusal.value.code == code


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    plain = ps.apply(captured("llama"), "lora_qv")
    model = applied("llama")
    allocator = ps.RankAllocator(model)
    kept = allocator.sites[0].zero
    file = tmp_path / "a_file"
    file.touch()
    attempts = {
        "PSG321": lambda: ps.RankAllocator(plain),
        "PSG321 did you mean 'adalora'": lambda: ps.RankAllocator(model, "adalor"),
        "PSG323": lambda: allocator.load(tmp_path),
        "PSG323 no parameter": lambda: allocator.load_state({"lm_head.kept": torch.ones(2)}),
        "PSG323 shape [2]": lambda: allocator.load_state({f"{kept}.kept": torch.ones(2) > 0}),
        "PSG323 holds": lambda: allocator.load_state({f"{kept}.kept": torch.ones(6)}),
        "PSG323 whole number": lambda: allocator.load_state({"step": torch.ones(2)}),
        "PSG323 missing": lambda: allocator.load_state({f"{kept}.kept": torch.ones(6) > 0}),
        "PSG323 not seen": lambda: ps.RankAllocator(model).step(50),
        "PSG323 was not seen": lambda: ps.RankAllocator(model).step(55),
        "PSG603 cannot be written": lambda: allocator.save(file),
    }
    for text, attempt in attempts.items():
        with pytest.raises(ps.SurgeryError) as refusal:
            attempt()
        code, _, words = text.partition(" ")
        assert refusal.value.code == code, text
        assert all(word in str(refusal.value) for word in words.split()), refusal.value
