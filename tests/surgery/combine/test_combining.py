"""Weighted combinations of adapters of any method: what each form promises, or a refusal."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.surgery.model.operated import OperatedModel
from peftsurgery.surgery.model.saved.contents import contents_of
from tests.parity.models import batch, captured
from tests.surgery.reference import randomise

BIASES = ps.Rule(match="parameter", where={"kind": "bias"}, train=True)
BOTTLENECK = """
name: bottleneck
with: {width: 4, strength: 1.0}
rules:
  - match: residual
    where: {after: ffn}
    params:
      D: {shape: [width, hidden], init: normal(0.02)}
      U: {shape: [hidden, width]}
      c: {shape: [hidden]}
    rewrite: h + strength * (linear(relu(linear(h, D)), U) + c)
"""

# The product of two products, entry by entry, as in LoHa; and what is not named in any rule here.
HADAMARD = ps.parse_rules("""
name: hadamard
with: {rank: 2, strength: 1.0}
rules:
  - match: linear
    where: {role: [attn.q, attn.v]}
    params:
      A: {shape: [rank, in]}
      B: {shape: [out, rank]}
      C: {shape: [rank, in]}
      D: {shape: [out, rank]}
    rewrite: y + strength * linear(x, (B @ A) * (D @ C))
    fold: W + strength * (B @ A) * (D @ C)
""")
SHIFT = ps.parse_rules("""
name: shift
with: {strength: 1.0}
rules:
  - match: linear
    where: {role: [attn.q, attn.v]}
    params: {s: {shape: [out]}}
    rewrite: y + strength * s
""")


def made(model: str, *parts: tuple[Any, dict[str, Any]]) -> OperatedModel:
    """A model with random adapters a, b, ... of these rules and settings, none of them active."""
    graph: Any = captured(model)
    for name, (rules, settings) in zip("abcdef", parts, strict=False):
        if isinstance(graph, OperatedModel):
            graph.deactivate()  # two adapters may train one parameter of the base
        graph = ps.apply(graph, rules, name=name, **settings)
    randomise(graph, scale=0.3).deactivate()
    return graph


@pytest.fixture(autouse=True, params=["llama"])
def name(request: pytest.FixtureRequest) -> str:
    """The model most tests here are of: they run where it is captured already."""
    return str(request.param)


@cache
def loras() -> OperatedModel:
    return made("llama", ("lora_qv", {"rank": 2}), ("lora_attention", {"rank": 3, "alpha": 5}))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(**batch(3, 6)).logits
    return result


def weights(model: OperatedModel, *names: str) -> dict[str, Tensor]:
    with model.only(*names):
        return {name: value.detach() for name, value in ps.fold(model).named_parameters()}


def assert_sum(model: OperatedModel, shares: dict[str, float], combined: OperatedModel) -> None:
    """The folded combination is the base and the weighted sum of what the adapters fold into it."""
    base, got = weights(model), weights(combined, "new")
    each = {name: weights(model, name) for name in shares}
    for name, value in base.items():
        added = sum(share * (each[n][name] - value) for n, share in shares.items())
        torch.testing.assert_close(got[name], value + added, rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize(("how", "settings"), [("cat", {}), ("svd", {"rank": 40})])
def test_adapters_of_other_rank_at_fewer_places_add_up(how: str, settings: dict[str, Any]) -> None:
    model, shares = loras(), {"a": 0.6, "b": -1.5}
    combined = ps.combine(model, shares, "new", how, **settings)
    assert combined.adapters == ("a", "b", "new")
    assert combined.active == ("new",)
    assert model.active == ()
    assert combined.operations[-1].settings["rank"] == settings.get("rank", 5)
    assert_sum(model, shares, combined)


@pytest.mark.parametrize(
    ("name", "rules", "settings"),
    [
        ("llama", "pissa", {}),
        ("llama", "adalora", {}),
        ("llama", "lora_embedding", {}),
        ("gpt2", "lora_qv", {}),
        ("llama", "rslora", {}),
    ],
)
def test_whatever_is_a_sum_over_its_rank_is_joined(
    name: str, rules: str, settings: dict[str, Any]
) -> None:
    model = made(name, (rules, {"rank": 3, **settings}), (rules, {"rank": 2, **settings}))
    assert_sum(model, {"a": 0.8, "b": 0.5}, ps.combine(model, {"a": 0.8, "b": 0.5}, "new", "cat"))


@pytest.mark.parametrize("name", ["bert"])
def test_bottlenecks_are_joined_to_one_that_adds_what_they_add(name: str) -> None:
    rules = ps.parse_rules(BOTTLENECK)
    model = made(name, (rules, {}), (rules, {"width": 2, "strength": 3.0}))
    combined = ps.combine(model, {"a": 1.0, "b": 1.0}, "new", "cat")
    values, strength = combined.learnt("new"), combined.operations[-1].settings["strength"]
    for full, value in values.items():
        a, b = (model.get_parameter(full.replace(".new.", f".{n}.")) for n in "ab")
        if full.endswith(".c"):
            torch.testing.assert_close(strength * value, a + 3 * b)
        else:
            assert value.numel() == a.numel() + b.numel()
    h = torch.randn(5, 32)
    path = next(full for full in values if full.endswith(".D")).rpartition(".new.")[0]

    def adds(graph: OperatedModel, adapter: str, strength: float) -> Tensor:
        D, U, c = (graph.get_parameter(f"{path}.{adapter}.ffn.{part}") for part in "DUc")
        return strength * ((h @ D.T).relu() @ U.T + c)

    both = adds(model, "a", 1.0) + adds(model, "b", 3.0)
    torch.testing.assert_close(adds(combined, "new", strength), both)


@pytest.mark.parametrize("rules", ["ia3", "dora"])
def test_parameters_that_are_no_factors_are_averaged_as_they_are(rules: str) -> None:
    model = made("llama", (rules, {}), (rules, {}))
    combined = ps.combine(model, {"a": 0.25, "b": 0.75}, "new", "peft_linear")
    for name, value in combined.learnt("new").items():
        a, b = (model.get_parameter(name.replace(".new.", f".{n}.")) for n in "ab")
        torch.testing.assert_close(value, 0.25 * a + 0.75 * b)


SUMS: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
    ("lora_qv", {"rank": 2, "alpha": 7}, {"rank": 2}),
    ("lora_attention", {"rank": 2}, {"rank": 5, "alpha": 3}),
    ("rslora", {"rank": 2}, {"rank": 4}),
    ("pissa", {"rank": 2}, {"rank": 3}),
    ("lora_embedding", {"rank": 2}, {"rank": 2}),
    ("adalora", {"rank": 3}, {"rank": 2}),
    ("ia3", {}, {}),
]


@pytest.mark.parametrize(("rules", "one", "other"), SUMS, ids=[each[0] for each in SUMS])
def test_the_default_is_the_weighted_sum_of_the_changes(
    rules: Any, one: dict[str, Any], other: dict[str, Any]
) -> None:
    model = made("llama", (rules, one), (rules, other))
    for shares in ({"a": 1.0, "b": -1.0}, {"a": 0.7, "b": 0.0}, {"b": -1.6}, {"a": 0.0}):
        combined = ps.combine(model, shares, "new")
        assert_sum(model, shares, combined)
        assert combined.report.to_dict()["lost"] == {}


def test_a_change_of_factors_is_that_of_plain_arithmetic() -> None:
    """Two adapters of equal rank, one taken away: peft's linear multiplies their cross terms."""
    model = made("llama", ("lora_qv", {"rank": 2}), ("lora_qv", {"rank": 2, "alpha": 3}))
    path, scales = "model.layers.1.self_attn.q_proj", {"a": 16 / 2, "b": 3 / 2}

    def change(name: str, scale: float) -> Tensor:
        A, B = (model.get_parameter(f"{path}.{name}.{part}").detach().double() for part in "AB")
        return scale * B @ A

    wanted = change("a", scales["a"]) - change("b", scales["b"])
    base, found = (
        weights(g, *n)[f"{path}.weight"].double()
        for g, n in ((model, ()), (ps.combine(model, {"a": 1, "b": -1}, "new"), ("new",)))
    )
    assert (found - base - wanted).abs().max() < 1e-6 * wanted.abs().max() + 1e-6
    crossed = ps.combine(model, {"a": 1, "b": -1}, "new", "peft_linear")
    theirs = weights(crossed, "new")[f"{path}.weight"].double() - base
    assert (theirs - wanted).abs().max() > 0.1 * wanted.abs().max()


@pytest.mark.parametrize("rules", ["dora", "rslora", "houlsby", "prefix_tuning", SHIFT, HADAMARD])
def test_one_adapter_of_weight_one_is_that_adapter(rules: Any) -> None:
    model = made("llama", (rules, {}), ("lora_qv", {}))
    with model.only("a"):
        wanted = logits(model)
    for shares in ({"a": 1.0}, {"a": 1, "b": 0}):
        assert torch.equal(logits(ps.combine(model, shares, "new")), wanted)


def test_what_has_no_size_is_summed_where_the_change_is_linear_in_it() -> None:
    model = made("llama", (SHIFT, {}), (SHIFT, {"strength": 3.0}))
    combined = ps.combine(model, {"a": 0.5, "b": -2.0}, "new")
    strength = combined.operations[-1].settings["strength"]
    for name, value in combined.learnt("new").items():
        a, b = (model.get_parameter(name.replace(".new.", f".{n}.")) for n in "ab")
        torch.testing.assert_close(strength * value, 0.5 * a - 6 * b)


def test_a_scaled_product_of_products_is_its_change_scaled() -> None:
    model = made("llama", (HADAMARD, {}))
    assert_sum(model, {"a": -0.7}, ps.combine(model, {"a": -0.7}, "new"))


def test_what_a_rank_loses_is_told_as_a_share_of_the_change(tmp_path: Path) -> None:
    """PiSSA adds the difference of two products, whose rank is twice that of the adapter."""
    model = made("llama", ("pissa", {"rank": 2}), ("pissa", {"rank": 3}))
    shares = {"a": 1.0, "b": 0.5}
    whole = ps.combine(model, shares, "new", "svd")
    assert whole.operations[-1].settings["rank"] == 10
    assert whole.report.lost == {}
    assert_sum(model, shares, whole)
    for more in ({"rank": 3}, {"clamp": 0.9}):
        combined = ps.combine(model, shares, "new", "svd", **more)
        base, wanted, got = weights(model), weights(whole, "new"), weights(combined, "new")
        changed = [name for name in base if not torch.equal(wanted[name], base[name])]
        missing = torch.cat([(wanted[n] - got[n]).flatten() for n in changed]).norm()
        share = missing / torch.cat([(wanted[n] - base[n]).flatten() for n in changed]).norm()
        assert combined.report.to_dict()["lost"] == {"new": pytest.approx(float(share), rel=1e-3)}
        assert f"'new' lacks {float(share):.2%} of the change" in str(combined.report)
        again = ps.apply(combined, "ia3", name="more")
        assert again.report.lost == combined.report.lost
        again.save(tmp_path / "saved", names=["new", "more"])
        saved = ps.load(tmp_path / "saved", model.base)
        assert saved.report.lost == combined.report.lost
        (held, other) = contents_of(tmp_path / "saved").adapters
        assert (held.lost, other.lost) == (combined.report.lost["new"], None)
        rest = ps.eject(again, "new")
        assert isinstance(rest, OperatedModel)
        assert rest.report.lost == {}


def test_one_adapter_scaled_is_its_change_scaled() -> None:
    model = loras()
    for factor in (0.3, -2.0):
        assert_sum(model, {"a": factor}, ps.combine(model, {"a": factor}, "new"))


@pytest.mark.parametrize("name", ["bert"])
def test_of_trained_parameters_of_the_base_the_changes_are_combined(name: str) -> None:
    model = made(name, (BIASES, {}), (BIASES, {}))
    shares = {"a": 0.5, "b": -2.0}
    combined = ps.combine(model, shares, "new")
    assert_sum(model, shares, combined)
    assert logits(combined).isfinite().all()
    assert "bert.embeddings.LayerNorm.new.bias" in combined.learnt("new")
    with pytest.raises(ps.SurgeryError, match="PSG316"):
        ps.combine(model, shares, "new", "cat")


def test_a_combination_is_trained_saved_and_taken_out_as_others(tmp_path: Any) -> None:
    combined = ps.combine(loras(), {"a": 1.0, "b": 1.0}, "new", "cat")
    trained = {name for name, p in combined.named_parameters() if p.requires_grad}
    assert trained == set(combined.learnt("new"))
    combined.save(tmp_path, names=["new"])
    again = ps.load(tmp_path, captured("llama"))
    assert torch.equal(logits(again), logits(combined))
    without = ps.eject(combined, "new")
    without.activate()
    loras().activate()
    assert torch.equal(logits(without), logits(loras()))
    loras().deactivate()


@pytest.mark.parametrize(
    ("parts", "how", "settings", "message"),
    [
        (["lora_qv", "dora"], "linear", {}, "PSG315: 'b' and 'a' are different methods at"),
        (["lora_qv", ("lora_qv", 4)], "peft_linear", {}, "PSG315: 'A' at .*q_proj has the shapes"),
        (["ia3", "lora_embedding"], "linear", {}, "PSG315: .* different places"),
        (["dora", "dora"], "cat", {}, "PSG316: 'dora' .* not proportional to any"),
        (["dora", "dora"], "linear", {}, "PSG316: 'dora' .* not proportional to any"),
        (["prefix_tuning", "prefix_tuning"], "linear", {}, "PSG316: 'prefix_tuning'"),
        ([HADAMARD, HADAMARD], "linear", {}, "PSG316: 'hadamard' .* no sum over its rank"),
        (["dora", "dora"], "svd", {}, "PSG316: 'dora' .* depends on the weight"),
        (["ia3", "ia3"], "cat", {}, "PSG316: 'ia3' .* no setting is the size"),
        (["adalora", "adalora"], "svd", {}, "PSG316: 'adalora' .* no product of two"),
        (["lora_qv", "lora_qv"], "ties", {}, "PSG317: 'ties' needs a? ?density"),
        (["lora_qv", "lora_qv"], "ties", {"density": 2.0}, "PSG317: a density"),
        (["lora_qv", "lora_qv"], "cat", {"rank": 3}, "PSG317: rank and clamp are for 'svd'"),
        (["lora_qv", "lora_qv"], "linear", {"rank": 3}, "PSG317: rank and clamp are for 'svd'"),
        (["lora_qv", "lora_qv"], "linear", {"density": 0.5}, "PSG317: 'linear' has no density"),
        (["lora_qv", "lora_qv"], "linaer", {}, "PSG317: no combination .*\n.*'linear'"),
    ],
)
def test_what_cannot_be_combined_is_refused_with_the_reason(
    parts: list[Any], how: str, settings: dict[str, Any], message: str
) -> None:
    pairs = [(p[0], {"rank": p[1]}) if isinstance(p, tuple) else (p, {}) for p in parts]
    with pytest.raises(ps.SurgeryError, match=message):
        ps.combine(made("llama", *pairs), {"a": 0.5, "b": 0.5}, "new", how, **settings)


@pytest.mark.parametrize(
    ("shares", "name", "code"),
    [
        ({"a": 1.0, "z": 1.0}, "new", "PSG310"),
        ({3: 1.0}, "new", "PSG310"),
        ({"a": 1.0}, "b", "PSG304"),
        ({"a": 1.0}, "b.c", "PSG304"),
        ({"a": 1.0}, 3, "PSG304"),
        ({}, "new", "PSG317"),
        (None, "new", "PSG317"),
        (["a", "b"], "new", "PSG317"),
        ("a", "new", "PSG317"),
        ({"a": float("nan")}, "new", "PSG317"),
        ({"a": float("inf")}, "new", "PSG317"),
        ({"a": 10**400}, "new", "PSG317"),
        ({"a": "1"}, "new", "PSG317"),
        ({"a": None}, "new", "PSG317"),
        ({"a": 1j}, "new", "PSG317"),
        ({"a": True}, "new", "PSG317"),
    ],
)
def test_names_and_weights_that_cannot_be_used_are_refused(
    shares: Any, name: Any, code: str
) -> None:
    with pytest.raises(ps.SurgeryError, match=code):
        ps.combine(loras(), shares, name)


@pytest.mark.parametrize(
    ("how", "settings"),
    [
        (None, {}),
        (3, {}),
        (["svd"], {}),
        ("svd", {"rank": 2.5}),
        ("svd", {"rank": "2"}),
        ("svd", {"rank": True}),
        ("svd", {"rank": 0}),
        ("svd", {"clamp": "1"}),
        ("svd", {"clamp": float("nan")}),
        ("ties", {"density": "0.5"}),
        ("ties", {"density": [0.5]}),
        ("ties", {"density": 0.5, "majority": None}),
        ("ties", {"density": 0.5, "majority": ["total"]}),
    ],
)
def test_settings_of_another_type_are_refused(how: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(ps.SurgeryError, match="PSG317"):
        ps.combine(loras(), {"a": 1.0}, "new", how, **settings)


def test_only_adapters_of_an_operated_model_are_combined() -> None:
    graph: Any = captured("llama")
    for model, kind in (
        (graph, "LlamaForCausalLM"),
        (nn.Linear(2, 2), "Linear"),
        (None, "NoneType"),
    ):
        with pytest.raises(ps.SurgeryError, match=f"PSG309: .*not of a {kind}"):
            ps.combine(model, {"a": 1.0}, "new")
