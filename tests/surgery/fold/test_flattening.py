"""Parameters that sites share, and methods that are something simpler once they are trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import peftsurgery as ps
from tests.models.captured import captured
from tests.models.zoo import ZOO

SHARED = ("E", "W", "b")


@pytest.fixture(scope="module", params=["llama", "t5"])
def operated(request: pytest.FixtureRequest) -> ps.OperatedModel:
    graph = captured(request.param)
    return ps.apply(graph, "prefix_tuning_mlp", length=3, bottleneck=16).eval()


def inputs(model: ps.OperatedModel) -> dict[str, torch.Tensor]:
    return ZOO["t5" if model.config.is_encoder_decoder else "llama"].inputs(3, 9)


def test_shared_parameters_are_one_object_at_every_site(operated: ps.OperatedModel) -> None:
    for name in SHARED:
        alike = [
            parameter
            for path, parameter in operated.named_parameters(remove_duplicate=False)
            if path.endswith(f"prefix_tuning_mlp.{name}")
        ]
        assert len(alike) == len(operated.cuts) + 1
        assert len({id(parameter) for parameter in alike}) == 1
    assert {"prefix_tuning_mlp.E", "prefix_tuning_mlp.W"} <= operated.learnt().keys()
    assert operated.report.trainable == sum(p.numel() for p in operated.learnt().values())


def test_the_gradient_of_a_shared_parameter_is_the_sum_over_its_sites() -> None:
    operated = ps.apply(captured("llama"), "prefix_tuning_mlp", length=3, bottleneck=16)
    operated(**ZOO["llama"].inputs(3, 9))[0].sum().backward()
    whole = operated.get_parameter("prefix_tuning_mlp.E").grad
    assert whole is not None
    parts = torch.zeros_like(whole)
    for cut in operated.cuts:
        flat = ps.flatten(operated)
        prefix = flat.get_submodule(cut.placed.module).get_submodule("prefix_tuning_mlp")
        ours = operated.get_submodule(cut.placed.module).get_submodule("prefix_tuning_mlp")
        flat(**ZOO["llama"].inputs(3, 9))[0].sum().backward()
        embeddings = operated.get_parameter("prefix_tuning_mlp.E").detach().requires_grad_()
        inner = torch.tanh(embeddings @ ours.W.T + ours.b)
        for letter in "KV":
            made = inner @ ours.get_parameter(f"W{letter}").T + ours.get_parameter(f"b{letter}")
            grad = prefix.get_parameter(letter).grad
            parts += torch.autograd.grad(made, embeddings, grad.flatten(1), retain_graph=True)[0]
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


def test_a_flattened_method_computes_the_same(operated: ps.OperatedModel) -> None:
    flat = ps.flatten(operated)
    assert [operation.file.name for operation in flat.operations] == ["prefix_tuning"]
    assert {name.rpartition(".")[2] for name in flat.learnt()} == {"K", "V"}
    with torch.no_grad():
        mine, theirs = (model(**inputs(operated))[0] for model in (flat, operated))
        base = operated.base(**inputs(operated))[0]
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    assert (theirs - base).abs().max() > 0.01
    assert ps.flatten(flat) is flat, "nothing is left to flatten"


def test_both_forms_are_saved_reloaded_and_ejected(
    operated: ps.OperatedModel, tmp_path: Path
) -> None:
    for number, model in enumerate((operated, ps.flatten(operated))):
        model.save(tmp_path / str(number))
        again = ps.load(tmp_path / str(number), operated.base).eval()
        assert again.learnt().keys() == model.learnt().keys()
        with torch.no_grad():
            result = again(**inputs(operated))[0]
            assert torch.equal(result, model(**inputs(operated))[0])
        assert ps.eject(again) is operated.base


def test_the_flat_form_goes_where_the_method_went() -> None:
    rules = ps.load_rules("prefix_tuning_mlp")
    first = rules.rules[0].model_copy(
        update={"where": rules.rules[0].where.model_copy(update={"layers": (1,)})}
    )
    operated = ps.apply(captured("llama"), rules.model_copy(update={"rules": (first,)}))
    assert [cut.placed.layer for cut in ps.flatten(operated).cuts] == [1]


def test_flat_parameters_are_made_of_names_that_there_are() -> None:
    with pytest.raises(ps.SurgeryError) as caught:
        ps.parse_rules(RULES)
    assert caught.value.code == "PSG113"


RULES = """
name: wrong
rules:
  - match: attention
    params: {K: {shape: [3, kv_heads, head_dim]}}
    rewrite: attention(q, concat(tokens(K), k), concat(tokens(K), v), extend(mask, 3))
flat: {rule: prefix_tuning, params: {K: K, V: W}}
"""


@pytest.mark.parametrize(
    ("code", "old", "new"),
    [
        ("PSG122", "shared: 1", "shared: 1 / 2"),
        ("PSG113", "shared: 1", "shared: depth"),
        ("PSG106", "with: {long: 3}", "with: {short: 3}"),
    ],
)
def test_groups_and_implied_settings_that_cannot_be_are_refused(
    code: str, old: str, new: str
) -> None:
    assert ps.apply(captured("llama"), ps.parse_rules(GROUPED)).learnt().keys() == {"grouped.1.K"}
    with pytest.raises(ps.SurgeryError) as caught:
        ps.apply(captured("llama"), ps.parse_rules(GROUPED.replace(old, new)))
    assert caught.value.code == code


GROUPED = """
name: grouped
with: {long: 2}
rules:
  - match: attention
    params: {K: {shape: [long, kv_heads, head_dim], shared: 1}}
    rewrite: attention(q, concat(tokens(K), k), concat(tokens(K), v), extend(mask, long))
checkpoint:
  peft: {peft_type: GROUPED, with: {long: 3}}
"""
