"""What is known of a rule's algebra, tried on specimens."""

from __future__ import annotations

import pytest

from peftsurgery.language.loading import load_rules, parse_rules
from peftsurgery.language.rule_algebra import rows_of
from peftsurgery.language.settings import resolve_settings


@pytest.mark.parametrize(
    ("name", "size"),
    [("lora_qv", "out"), ("dora", "out"), ("ia3", "out"), ("lora_embedding", "in")],
)
def test_methods_that_fold_every_row_by_itself(name: str, size: str) -> None:
    file = load_rules(name)
    assert {rows_of(rule, resolve_settings(file)) for rule in file.rules if rule.fold} == {size}


@pytest.mark.parametrize("fold", ["W - s * norm(W, 0)", "M @ W"])
def test_rows_that_are_mixed_are_not_folded_by_themselves(fold: str) -> None:
    text = f"""
name: mixing
rules:
  - match: linear
    params:
      s: {{shape: [], init: zeros}}
      M: {{shape: [out, out], init: zeros}}
    rewrite: linear(x, {fold}, b)
    fold: {{W: "{fold}"}}
"""
    assert rows_of(parse_rules(text).rules[0], {}) is None
