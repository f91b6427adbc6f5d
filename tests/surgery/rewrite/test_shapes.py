"""Which cuts have their shapes checked: one of those that do alike at a site."""

from __future__ import annotations

from typing import Any

import pytest

import peftsurgery as ps
from peftsurgery.errors import SurgeryError
from peftsurgery.surgery.rewrite.shapes import unlike
from tests.models.captured import captured

WRONG = """
name: wrong
about: A sum with a vector of another size.
rules:
  - match: linear
    where: {role: attn.v}
    params: {v: {shape: [7], init: zeros}}
    rewrite: y + v
"""


def checked(model: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for cut in unlike(model.cuts):
        found[cut.operation.name] = found.get(cut.operation.name, 0) + 1
    return found


def test_adapters_of_one_rule_and_size_are_checked_once() -> None:
    model: Any = captured("llama")
    for name, rank in (("a", 4), ("b", 4), ("c", 8), ("d", 4)):
        model = ps.apply(model, "lora_qv", name=name, rank=rank)
    made = {cut.operation.name for cut in model.cuts}
    assert made == {"a", "b", "c", "d"}
    found = checked(model)
    assert found.keys() == {"a", "c"}
    assert found["a"] == found["c"]


def test_another_rule_at_the_same_sites_is_checked(tmp_path: Any) -> None:
    model: Any = ps.apply(captured("llama"), "lora_qv")
    assert checked(ps.apply(model, "ia3")).keys() == {"lora_qv", "ia3"}
    page = tmp_path / "wrong.yaml"
    page.write_text(WRONG, encoding="utf-8")
    with pytest.raises(SurgeryError) as error:
        ps.apply(model, page)
    assert error.value.code == "PSG116", error.value
