"""apply and eject: new models that share the base, compute what the rule says, and come off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import peftsurgery as ps
from tests.models.captured import captured
from tests.models.zoo import ZOO
from tests.surgery.reference import adapted, outputs, pairs_of, randomise

MODELS = [
    "bert",
    "gpt2",
    "opt",
    "llama",
    "t5",
    "functional",
    "transformer_encoder",
    "falcon_40b",
    "swin",
]


@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_lora_changes_nothing_and_eject_gives_the_base_back(name: str) -> None:
    original = ZOO[name].build()
    expected = outputs(original, name)
    # torch's linear may round otherwise where its weight is frozen, as an operated model's is
    frozen = outputs(original.requires_grad_(False), name)
    operated = ps.apply(captured(name), "lora_attention")
    assert torch.equal(outputs(operated, name), frozen)
    randomise(operated)
    assert (outputs(operated, name) - frozen).abs().max() > 1e-3
    ejected = ps.eject(operated)
    assert torch.equal(outputs(ejected, name), expected)
    assert ejected.captures == captured(name).captures
    assert list(ejected.state_dict()) == list(captured(name).state_dict())


@pytest.mark.parametrize("name", ["bert", "opt", "llama", "t5"])
def test_lora_computes_what_hooks_on_the_original_compute(name: str) -> None:
    operated = randomise(ps.apply(captured(name), "lora_all_linear", rank=3, alpha=6))
    with adapted(ZOO[name].build(), pairs_of(operated, 2.0)) as reference:
        expected = outputs(reference, name)
    torch.testing.assert_close(outputs(operated, name), expected, atol=1e-5, rtol=1e-5)


def test_the_report_says_what_was_matched_and_added() -> None:
    report = ps.apply(captured("gpt2"), "lora_qv", rank=4).report
    data = report.to_dict()
    assert [(m["role"], m["module"], m["slice"]["part"]) for m in data["matches"]] == [
        (role, f"transformer.h.{layer}.attn.c_attn", part)
        for layer in range(2)
        for role, part in (("attn.q", "q"), ("attn.v", "v"))
    ]
    assert data["added"]["transformer.h.0.attn.c_attn.lora_qv.q.A"] == [4, 32]
    assert data["trainable"] == 2 * 2 * 4 * (32 + 32)
    assert "4 sites (2 attn.q, 2 attn.v)" in str(report)
    assert data["near_misses"][0]["reasons"]


def test_two_adapters_of_one_rule_add_up() -> None:
    graph = captured("llama")
    first = ps.apply(graph, "lora_qv", name="one", rank=2, alpha=4)
    both = randomise(ps.apply(first, "lora_qv", name="two", rank=2, alpha=4))
    assert len(both.report.matches) == 8
    with adapted(ZOO["llama"].build(), pairs_of(both, 2.0)) as reference:
        expected = outputs(reference, "llama")
    torch.testing.assert_close(outputs(both, "llama"), expected, atol=1e-5, rtol=1e-5)
    alone = ps.eject(both, "two")
    assert set(alone.learnt()) == set(first.learnt())
    kept = {name: value for name, value in both.learnt().items() if ".one." in name}
    assert all(torch.equal(value, alone.learnt()[name]) for name, value in kept.items())


def test_a_second_operation_keeps_what_the_first_learnt() -> None:
    first = randomise(ps.apply(captured("bert"), "lora_qv"))
    both = ps.apply(first, "lora_embedding")
    assert torch.equal(outputs(both, "bert"), outputs(first, "bert"))


def test_dora_over_lora_normalises_the_weight_that_lora_made() -> None:
    lora = randomise(ps.apply(captured("llama"), "lora_qv"))
    both = ps.apply(lora, "dora")
    randomise(both, seed=3)
    folded = ps.fold(both)
    torch.testing.assert_close(
        outputs(folded, "llama"), outputs(both, "llama"), atol=1e-6, rtol=1e-5
    )


def test_blocks_cut_alike_share_one_program_and_others_do_not() -> None:
    graph = captured("llama")
    both = ps.apply(graph, "lora_qv").captures[0].programs
    assert both["model.layers.0"] == both["model.layers.1"]
    rules = ps.parse_rules(
        """
        name: first_layer
        rules:
          - match: linear
            where: {role: attn.q, layers: [0]}
            params: {A: {shape: [out, in]}}
            rewrite: y + linear(x, A)
            fold: W + A
        """
    )
    one = ps.apply(graph, rules).captures[0].programs
    assert one["model.layers.0"] != one["model.layers.1"]
    assert list(one["model.layers.1"]) == list(graph.captures[0].programs["model.layers.1"])


@pytest.mark.parametrize(
    ("rules", "settings", "code"),
    [
        ("lora_qx", {}, "PSG107"),
        ("lora_qv", {"ranks": 4}, "PSG120"),
        ("lora_qv", {"rank": "four"}, "PSG121"),
        ("lora_qv", {"rank": -1}, "PSG122"),
        ("lora_conv", {}, "PSG301"),
        ("lora_qv", {"name": "a.b"}, "PSG304"),
    ],
)
def test_what_does_not_fit_is_refused_by_code(rules: str, settings: dict, code: str) -> None:
    with pytest.raises(ps.SurgeryError) as caught:
        ps.apply(captured("llama"), rules, **settings)
    assert caught.value.code == code


def test_the_same_name_twice_is_refused() -> None:
    operated = ps.apply(captured("llama"), "lora_qv")
    with pytest.raises(ps.SurgeryError, match="PSG304"):
        ps.apply(operated, "lora_qv")


def test_rules_are_not_applied_to_a_module_that_was_not_captured() -> None:
    with pytest.raises(ps.SurgeryError, match="PSG309"):
        ps.apply(ZOO["llama"].build(), "lora_qv")


def test_a_rewrite_of_another_shape_is_refused() -> None:
    rule = ps.Rule(
        match="linear",
        where={"role": "attn.q"},
        params={"A": {"shape": ["in", "in + 1"]}},
        rewrite="concat(y, y)",
    )
    with pytest.raises(ps.SurgeryError, match="PSG306"):
        ps.apply(captured("llama"), rule)


def test_a_model_that_was_cast_is_operated_on_as_it_is() -> None:
    graph = ps.capture(ZOO["llama"].build()).to(torch.bfloat16)
    operated = randomise(ps.apply(graph, "lora_qv"))
    weight = "model.layers.0.self_attn.q_proj.weight"
    assert operated.get_parameter(weight).data_ptr() == graph.get_parameter(weight).data_ptr()
    assert outputs(operated, "llama").dtype == torch.bfloat16
    folded = ps.fold(operated)
    assert {parameter.dtype for parameter in folded.parameters()} == {torch.bfloat16}
    A, B = (operated.get_parameter(name) for name in operated.report.matches[0]["added"])
    expected = (graph.get_parameter(weight).float() + 2.0 * (B @ A)).to(torch.bfloat16)
    assert torch.equal(folded.get_parameter(weight), expected)


def test_settings_are_one_dict_and_keywords_are_sugar_for_it(tmp_path: Path) -> None:
    graph = captured("llama")
    one = ps.apply(graph, "lora_qv", settings={"rank": np.int64(3)}, alpha=torch.tensor(6))
    two = ps.apply(graph, "lora_qv", rank=3, alpha=6)
    assert one.report.to_dict() == two.report.to_dict()
    assert one.operations[0].settings == two.operations[0].settings
    one.save(tmp_path / "saved")
    again = ps.load(tmp_path / "saved", graph)
    assert again.operations[0].settings == two.operations[0].settings
    with pytest.raises(ps.SurgeryError, match="given twice"):
        ps.apply(graph, "lora_qv", settings={"rank": 3}, rank=3)


@pytest.mark.parametrize("word", ["model", "rules", "name", "train", "settings", "x"])
def test_any_word_may_be_a_key_of_settings_and_is_refused_as_unknown(word: str) -> None:
    with pytest.raises(ps.SurgeryError) as refusal:
        ps.apply(captured("llama"), "lora_qv", settings={word: "q_proj"})
    assert refusal.value.code == "PSG120"
