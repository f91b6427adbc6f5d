"""sites and why: what a model offers to rules, said as rules themselves would find it."""

from __future__ import annotations

import pytest

import peftsurgery as ps
from tests.models.captured import captured


def test_sites_are_narrowed_counted_and_told() -> None:
    found = ps.sites(captured("llama"))
    queries = found.where(role="attn.q")
    assert [site.module for site in queries] == [
        f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)
    ]
    assert queries.assert_count(2) is queries
    assert len(found.where(role="attn.*", layers="1..")) == 4
    assert {site.kind for site in found.where(kind="attention")} == {"attention"}
    assert {site.facts["kind"] for site in found.where(kind="self")} == {"self"}
    assert len(found.where(path=r".*\.mlp\..*").where(kind="linear", layers=0)) == 3
    assert str(queries).splitlines()[1].split() == [
        "2", "linear", "attn.q", "model.layers.{0..1}.self_attn.q_proj",
    ]  # fmt: skip
    data = queries.to_dict()
    assert [site["role"] for site in data["sites"]] == ["attn.q", "attn.q"]
    assert data["counts"][-1] == {"clause": "role: attn.q", "left": 2}
    assert not found.where(layers=9)


def test_a_selection_refuses_another_count_and_what_is_no_clause() -> None:
    found = ps.sites(captured("llama"))
    with pytest.raises(ps.SurgeryError, match="PSG302: sites: 2 sites are chosen, expected 3"):
        found.where(role="attn.q").assert_count(3)
    for clauses, code in (({"rle": 1}, "PSG105"), ({"layers": "x"}, "PSG106"),
                          ({"role": "attn.w"}, "PSG142")):  # fmt: skip
        with pytest.raises(ps.SurgeryError, match=code):
            found.where(**clauses)


def test_why_says_what_each_clause_made_of_a_module() -> None:
    answer = ps.why(captured("llama"), "lora_qv", "model.layers.0.self_attn.k_proj")
    assert "role is attn.k, not one of attn.q, attn.v" in str(answer)
    (rule,) = answer.to_dict()["rules"]
    assert (rule["rule"], rule["kept"]) == ("lora_qv", False)
    kept = ps.why(captured("llama"), ps.load_rules("lora"), "model.layers.0.mlp.up_proj",
                  settings={"roles": ["ffn.up"]})  # fmt: skip
    assert kept.to_dict()["rules"][0]["kept"]
    with pytest.raises(ps.SurgeryError, match="PSG303"):
        ps.why(captured("llama"), "lora", "model.layers.0.self_attn.k_prj")


def test_why_means_an_adapter_as_it_was_applied() -> None:
    model = ps.apply(captured("llama"), "lora", name="a", where={"layers": 1})
    path = "model.layers.0.self_attn.q_proj"
    assert "layer 0" in str(ps.why(model, "a", path))
    assert not ps.why(model, "a", path).to_dict()["rules"][0]["kept"]
    assert ps.why(model, "lora_qv", path).to_dict()["rules"][0]["kept"]


def test_a_pattern_that_occurs_nowhere_names_what_comes_nearest() -> None:
    pattern = "mul(silu(linear(x, a)), relu(linear(x, b)))"
    text = f"name: p\nrules: [{{match: {{pattern: '{pattern}'}}, rewrite: y}}]"
    with pytest.raises(ps.SurgeryError, match="PSG301") as caught:
        ps.apply(captured("llama"), ps.parse_rules(text))
    assert "model.layers.0.mlp" in str(caught.value.hint)
    assert "'relu(linear(x, b))' of the pattern is linear there" in str(caught.value.hint)
