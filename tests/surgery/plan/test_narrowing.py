"""Narrowing by a user: what is cut is what a copied file would cut, and the rules still expect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import peftsurgery as ps
from tests.models.captured import captured
from tests.models.zoo import ZOO


def added(model: ps.OperatedModel) -> dict[str, tuple[int, ...]]:
    """The shapes of what was added, by the name in the model."""
    return {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("where", "lines"),
    [
        ({"layers": "1.."}, "    where: {role: $roles, layers: 1..}"),
        ({"role": ["attn.q"]}, "    where: {role: attn.q}"),
        ({"path": r".*\.q_proj"}, r"    where: {role: $roles, path: '.*\.q_proj'}"),
        ({"not": {"layers": 0}}, "    where: {role: $roles, not: {layers: 0}}"),
    ],
)
def test_what_is_narrowed_is_what_a_copied_file_does(where: dict[str, Any], lines: str) -> None:
    text = Path("rules/lora.yaml").read_text(encoding="utf-8")
    copied = ps.parse_rules(text.replace("    where: {role: $roles}", lines))
    graph = captured("llama")
    torch.manual_seed(0)
    narrowed = ps.apply(graph, "lora", where=where)
    torch.manual_seed(0)
    expected = ps.apply(graph, copied)
    assert narrowed.report.matches == expected.report.matches
    assert all(map(torch.equal, narrowed.parameters(), expected.parameters()))


def test_sites_have_the_settings_of_the_first_entry_that_they_satisfy() -> None:
    made = ps.apply(
        captured("llama"),
        "lora",
        rank=2,
        by=[
            {"where": {"layers": 0}, "rank": 3},
            {"where": {"role": "attn.q"}, "rank": 4, "alpha": 1},
        ],
    )
    assert {name: shape[0] for name, shape in added(made).items() if name.endswith("A")} == {
        "model.layers.0.self_attn.q_proj.lora.A": 3,
        "model.layers.0.self_attn.v_proj.lora.A": 3,
        "model.layers.1.self_attn.q_proj.lora.A": 4,
        "model.layers.1.self_attn.v_proj.lora.A": 2,
    }
    scales = {cut.placed.module: cut.operation.settings["scale"] for cut in made.cuts}
    assert list(scales.values()) == [16 / 3, 16 / 3, 1 / 4, 8.0]
    assert list(made.adapters) == ["lora"]


def test_all_sites_may_have_settings_of_their_own() -> None:
    by = [{"where": {"layers": "..0"}, "rank": 1}, {"where": {"layers": "1.."}, "rank": 2}]
    ranks = {shape[0] for n, shape in added(ps.apply(captured("llama"), "lora", by=by)).items()
             if n.endswith("A")}  # fmt: skip
    assert ranks == {1, 2}


def test_what_a_rule_expects_is_said_of_it_before_it_is_narrowed() -> None:
    assert len(ps.apply(captured("llama"), "lora_qv", where={"role": "attn.q"}).cuts) == 2
    rules = ps.parse_rules("name: t\nrules: [{match: linear, expect: 3, rewrite: y * 2}]")
    with pytest.raises(ps.SurgeryError, match="PSG302"):
        ps.apply(captured("llama"), rules, where={"role": "attn.q", "layers": 0})


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        ({"where": {"layers": "7.."}}, "PSG301", "nearest miss"),
        ({"where": {"role": "attn.w"}}, "PSG142", "attn"),
        ({"where": {"lay": 1}}, "PSG105", "layers"),
        ({"where": {"layers": "x"}}, "PSG106", "layer"),
        ({"where": {"path": 3}}, "PSG106", "apply(where=): path"),
        ({"where": {"path": "("}}, "PSG141", "("),
        ({"where": 3}, "PSG904", "dict"),
        ({"by": {"rank": 3}}, "PSG904", "list"),
        ({"by": [{"rank": 3}]}, "PSG904", "where"),
        ({"by": [{"where": {"layers": 1}}]}, "PSG904", "settings"),
        ({"by": [{"where": {"layers": 1}, "rnk": 3}]}, "PSG120", "rank"),
        ({"by": [{"where": {"layers": 1}, "rank": 0}]}, "PSG122", "rank"),
        ({"by": [{"where": {"layers": 5}, "rank": 3}]}, "PSG301", "layers: 5"),
        (
            {"by": [{"where": {"layers": 0}, "rank": 1}, {"where": {"layers": "..0"}, "rank": 2}]},
            "PSG301",
            "not (layers: 0)",
        ),
    ],
)
def test_a_narrowing_that_says_nothing_is_refused(
    given: dict[str, Any], code: str, words: str
) -> None:
    with pytest.raises(ps.SurgeryError) as caught:
        ps.apply(captured("llama"), "lora", **given)
    assert caught.value.code == code, caught.value
    assert words in f"{caught.value.message} {caught.value.hint}"


def test_keys_are_not_added_without_the_positions_that_come_with_them() -> None:
    graph, where = captured("llama"), {"layers": 0}
    assert len(ps.apply(graph, "prefix_tuning", where=where).cuts) == 1
    assert len(ps.apply(graph, "prefix_tuning", shift=True).cuts) == 3
    with pytest.raises(ps.SurgeryError, match="PSG332"):
        ps.apply(graph, "prefix_tuning", where=where, shift=True)
    with pytest.raises(ps.SurgeryError, match="PSG301"):
        ps.apply(graph, "prefix_tuning", where={"layers": 9}, shift=True)


@pytest.mark.parametrize("rule", ["lora", "pfeiffer", "prefix_tuning", "unipelt", "bitfit"])
def test_a_saved_surgery_records_what_was_narrowed(rule: str, tmp_path: Path) -> None:
    graph, inputs = captured("bert"), ZOO["bert"].inputs(2, 5)
    made = ps.apply(graph, rule, where={"layers": "1.."}).eval()
    made.save(tmp_path / "s")
    entry = json.loads((tmp_path / "s" / "surgery.json").read_text())["operations"][0]
    assert entry["where"] == {"layers": ["1.."]}
    again = ps.load(tmp_path / "s", base=graph).eval()
    assert again.report.matches == made.report.matches
    with torch.no_grad():
        assert torch.equal(again(**inputs)[0], made(**inputs)[0])
    entry["where"] = {"lay": 1}
    manifest = tmp_path / "s" / "surgery.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "operations": [entry]}))
    with pytest.raises(ps.SurgeryError, match="PSG605"):
        ps.load(tmp_path / "s", base=graph)


def test_an_adapter_with_settings_by_place_is_saved_folded_and_taken_out(tmp_path: Path) -> None:
    graph, inputs = captured("llama"), ZOO["llama"].inputs(2, 5)
    made = ps.apply(graph, "lora", by=[{"where": {"layers": 0}, "rank": 3, "alpha": 5}]).eval()
    with torch.no_grad():
        for name, value in made.named_parameters():
            if name.endswith("B"):
                value.normal_(0, 0.1)
        expected = made(**inputs)[0]
        made.save(tmp_path / "s")
        assert torch.equal(ps.load(tmp_path / "s", base=graph).eval()(**inputs)[0], expected)
        torch.testing.assert_close(ps.fold(made)(**inputs)[0], expected)
        assert ps.eject(made, "lora") is graph
