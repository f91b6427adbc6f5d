"""Rules of one's own: operators and roles from Python, patterns, inputs rewritten, base trained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import peftsurgery as ps
from tests.models.captured import captured
from tests.models.zoo import ZOO
from tests.surgery.reference import randomise


def logits(model: torch.nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        return model(**ZOO[name].inputs(2, 6))[0]


@ps.operator("squash")
def squash(x: Tensor, limit: float) -> Tensor:
    """x, bent softly below a limit."""
    return limit * torch.tanh(x / limit)


def test_an_operator_in_python_is_sewn_in() -> None:
    rule = ps.Rule(match="linear", where={"role": "lm_head"}, rewrite="squash(y, 0.5)")
    operated = ps.apply(captured("llama"), rule)
    expected = 0.5 * torch.tanh(logits(ZOO["llama"].build(), "llama") / 0.5)
    torch.testing.assert_close(logits(operated, "llama"), expected)


def test_a_role_in_python_selects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftsurgery.language.roles._registered", {})  # not for other tests

    @ps.role("narrowing")
    def narrowing(site: object) -> bool:
        """A linear with fewer outputs than inputs."""
        facts = site.facts
        return site.kind == "linear" and facts["out"] < facts["in"]

    rule = ps.Rule(
        match="linear",
        where={"role": "narrowing"},
        params={"A": {"shape": ["out", "in"]}},
        rewrite="y + linear(x, A)",
    )
    modules = {m["module"] for m in ps.apply(captured("llama"), rule).report.matches}
    parts = ("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
    assert modules == {f"model.layers.{i}.{part}" for i in range(2) for part in parts}


def test_a_pattern_is_found_and_rewritten() -> None:
    rule = ps.Rule(
        match={"pattern": "mul(silu(linear(x, gate)), linear(x, up))"}, rewrite="0.5 * y"
    )
    operated = ps.apply(captured("llama"), rule)
    assert len(operated.report.matches) == 2
    reference = ZOO["llama"].build()
    for layer in reference.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda part, args: (0.5 * args[0],))
    torch.testing.assert_close(logits(operated, "llama"), logits(reference, "llama"))


def test_a_pattern_can_add_parameters_and_fold_into_what_it_binds() -> None:
    rule = ps.Rule(
        match={"pattern": "mul(silu(linear(x, gate)), linear(x, up))"},
        params={"s": {"shape": [48], "init": "ones"}},
        rewrite="y * s",
        fold={"up": "up * s[:, None]"},
    )
    operated = randomise(ps.apply(captured("llama"), rule))
    assert set(operated.learnt()) == {f"model.layers.{i}.mlp.custom.s" for i in range(2)}
    folded = ps.fold(operated)
    changed = {
        n
        for n, p in folded.named_parameters()
        if not torch.equal(p, captured("llama").get_parameter(n))
    }
    assert changed == {f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)}
    torch.testing.assert_close(logits(folded, "llama"), logits(operated, "llama"))


def test_a_pattern_sees_a_weight_that_is_held_turned_as_any_other() -> None:
    rule = ps.Rule(
        match={"pattern": "linear(x, W, b)"},
        where={"path": r".*attn\.c_proj"},
        params={"A": {"shape": [2, 32]}, "B": {"shape": [32, 2]}},
        rewrite="linear(x, 2 * W, b) + linear(linear(x, A), B)",
        fold={"W": "2 * W + B @ A"},
    )
    operated = randomise(ps.apply(captured("gpt2"), rule))
    reference = ZOO["gpt2"].build()
    with torch.no_grad():
        for index, block in enumerate(reference.transformer.h):
            path = f"transformer.h.{index}.attn.c_proj.custom"
            A, B = (operated.get_parameter(f"{path}.{name}") for name in "AB")
            weight = block.attn.c_proj.weight  # (in, out)
            assert weight.shape == (32, 32)
            weight.copy_(2 * weight + (B @ A).T)
    expected = logits(reference, "gpt2")
    torch.testing.assert_close(logits(operated, "gpt2"), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(ps.fold(operated), "gpt2"), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fold", [{"up": "up * s"}, {"gate": "gate * sum(x, -1)"}])
def test_what_a_pattern_folds_must_be_a_weight(fold: dict[str, str]) -> None:
    rule = ps.Rule(
        match={"pattern": "mul(silu(linear(x, gate)), up)"},
        params={"s": {"shape": [48], "init": "ones"}},
        rewrite="y * s",
        fold=fold,
    )
    with pytest.raises(ps.SurgeryError, match=r"PSG401.*no weight"):
        ps.fold(ps.apply(captured("llama"), rule))


def test_the_input_of_a_site_can_be_rewritten_for_it_alone() -> None:
    rules = ps.parse_rules(
        """
        name: scale_in
        rules:
          - match: linear
            where: {role: attn.k}
            params: {s: {shape: [in], init: ones}}
            rewrite: {x: x * s}
            fold: W * s
        """
    )
    operated = randomise(ps.apply(captured("llama"), rules))
    reference = ZOO["llama"].build()
    for index, layer in enumerate(reference.model.layers):
        s = operated.get_parameter(f"model.layers.{index}.self_attn.k_proj.scale_in.s").detach()
        layer.self_attn.k_proj.register_forward_pre_hook(lambda part, args, s=s: (args[0] * s,))
    torch.testing.assert_close(logits(operated, "llama"), logits(reference, "llama"))
    folded = ps.fold(operated)
    torch.testing.assert_close(logits(folded, "llama"), logits(operated, "llama"))


def test_train_true_trains_a_copy_of_the_base() -> None:
    rule = ps.Rule(match="parameter", where={"kind": "bias"}, train=True)
    graph = captured("bert")
    operated = ps.apply(graph, rule)
    trained = {name for name, p in operated.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in graph.named_parameters() if name.endswith("bias")}
    before = logits(graph, "bert")
    randomise(operated)
    assert torch.equal(logits(graph, "bert"), before)
    assert not torch.equal(logits(operated, "bert"), before)
    folded = ps.fold(operated)
    assert torch.equal(logits(folded, "bert"), logits(operated, "bert"))
    assert torch.equal(logits(ps.eject(operated), "bert"), before)


def test_a_rule_with_no_fold_says_so() -> None:
    rule = ps.Rule(match="linear", where={"role": "lm_head"}, rewrite="squash(y, 0.5)")
    with pytest.raises(ps.SurgeryError, match="PSG401"):
        ps.fold(ps.apply(captured("llama"), rule))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_fold_that_scales_the_bias_works_with_and_without_one(name: str) -> None:
    rule = ps.Rule(
        match="linear",
        where={"role": "ffn.up"},
        params={"s": {"shape": ["out"], "init": "ones"}},
        rewrite="y * s",
        fold={"W": "W * s[:, None]", "b": "b * s"},
    )
    operated = randomise(ps.apply(captured(name), rule))
    folded = ps.fold(operated)
    torch.testing.assert_close(logits(folded, name), logits(operated, name), atol=1e-6, rtol=1e-5)


def test_a_fold_into_a_bias_that_is_not_there_is_refused() -> None:
    rule = ps.Rule(
        match="linear",
        where={"role": "attn.q"},
        params={"c": {"shape": ["out"]}},
        rewrite="y + c",
        fold={"b": "b + c"},
    )
    with pytest.raises(ps.SurgeryError, match="PSG405"):
        ps.fold(randomise(ps.apply(captured("llama"), rule)))
    operated = randomise(ps.apply(captured("bert"), rule))
    torch.testing.assert_close(logits(ps.fold(operated), "bert"), logits(operated, "bert"))


def test_a_rule_without_parameters_may_drop_out() -> None:
    rule = ps.Rule(match="linear", where={"role": "ffn.down"}, rewrite="dropout(y, 0.5)")
    operated = ps.apply(captured("llama"), rule)
    assert torch.equal(logits(operated, "llama"), logits(captured("llama"), "llama"))
    moving = [logits(operated.train(), "llama") for _ in range(2)]
    assert not torch.equal(*moving)


def test_rewriting_what_a_site_has_not_is_refused() -> None:
    rule = ps.Rule(match="linear", where={"role": "attn.q"}, rewrite={"b": "2 * b"})
    with pytest.raises(ps.SurgeryError, match="PSG305"):
        ps.apply(captured("llama"), rule)
    doubled = ps.apply(captured("bert"), rule)
    reference = ZOO["bert"].build()
    with torch.no_grad():
        for layer in reference.bert.encoder.layer:
            layer.attention.self.query.bias.mul_(2)
    torch.testing.assert_close(logits(doubled, "bert"), logits(reference, "bert"))


def test_a_scaled_input_and_dora_at_one_place_fold_together() -> None:
    scaled = ps.Rule(
        match="linear",
        where={"role": "attn.q"},
        params={"s": {"shape": ["in"], "init": "ones"}},
        rewrite={"x": "x * s"},
        fold="W * s",
    )
    first = randomise(ps.apply(captured("llama"), scaled))
    with_input = logits(first, "llama")
    assert not torch.equal(with_input, logits(captured("llama"), "llama"))
    torch.testing.assert_close(logits(ps.fold(first), "llama"), with_input, atol=1e-6, rtol=1e-5)
    both = randomise(ps.apply(first, "dora"), seed=4)
    torch.testing.assert_close(
        logits(ps.fold(both), "llama"), logits(both, "llama"), atol=1e-6, rtol=1e-5
    )
