"""The table of methods: every shipped rule has a row or a reason, and rows say what they mean."""

from __future__ import annotations

import pytest

from peftsurgery.language.loading import load_rules
from peftsurgery.language.shipped import shipped
from tools.bench.methods import measurable, remarks, table
from tools.bench.recipes import CLOSE, ELSEWHERE, FULL, RECIPES
from tools.bench.task import shape

RUN = {"trainable": 10, "accuracy": 0.7, "step_ms": 5.0, "loss": 1.0, "peak_gb": 0.5, "fold": 1e-7}


def test_every_shipped_rule_has_a_row_or_a_reason() -> None:
    rows = {rule for name in measurable() for rule in RECIPES[name].rules or (name,)} - {FULL}
    assert {*rows, *ELSEWHERE} == set(shipped())


@pytest.mark.parametrize("name", [name for name in RECIPES if name in shipped()])
def test_the_settings_of_a_row_are_those_of_its_rule(name: str) -> None:
    assert set(RECIPES[name].settings) <= set(load_rules(name).with_)


def test_the_table_says_which_methods_are_far_from_full_fine_tuning() -> None:
    rows = {name: {"ours": RUN, "theirs": None} for name in measurable()}
    rows["pfeiffer"] = {"ours": {**RUN, "accuracy": 0.6}, "theirs": {"error": "not done in 1 s"}}
    lines = "\n".join(remarks(rows))
    assert "lora_qv: +0.0 points from full fine-tuning, within two points" in lines
    assert "pfeiffer: -10.0 points from full fine-tuning, MORE THAN TWO POINTS" in lines
    assert "pfeiffer (peft): not done in 1 s" in lines
    assert table(rows).row_count == len(measurable())
    assert set(CLOSE) <= set(measurable())


def test_the_rate_rises_and_falls() -> None:
    rates = [shape(step, 100) for step in range(100)]
    assert rates[9] == max(rates) == 1
    assert 0 < rates[0] < rates[5]
    assert rates[99] < 0.02
