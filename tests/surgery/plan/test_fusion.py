"""AdapterFusion against forward hooks on the original, and rules over other adapters at large."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftsurgery as ps
from peftsurgery.surgery.model.operated import OperatedModel
from tests.models.captured import captured
from tests.models.zoo import ZOO
from tests.surgery.bottlenecks import Norm, leaves, readout, rewritten, under
from tests.surgery.reference import losses_of, randomise

MEAN = """
name: average
with: {adapters: []}
rules:
  - match: linear
    over: $adapters
    rewrite: mean(outputs, -2)
"""


def logits(model: Any, name: str) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**ZOO[name].inputs(3, 6))[0]
    return result


def two(name: str, rule: str = "pfeiffer") -> OperatedModel:
    """Two adapters of one rule, neither of them at its start."""
    first = ps.apply(captured(name), rule, name="a", reduction_factor=8)
    return randomise(ps.apply(first, rule, name="b", reduction_factor=4), scale=0.2).eval()


def fused(name: str, rule: str = "pfeiffer", **settings: Any) -> OperatedModel:
    """A fusion of two adapters, not at its start."""
    return over(two(name, rule), **settings)


def over(adapters: OperatedModel, **settings: Any) -> OperatedModel:
    """A fusion of the adapters a and b, itself moved off its start."""
    model = ps.apply(adapters, "adapter_fusion", name="f", adapters=["a", "b"], **settings).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in model.learnt("f").values():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model


def up(p: dict[str, Tensor], read: Tensor) -> Tensor:
    return (read @ p["D"].T + p["bd"]).clamp(min=0) @ p["U"].T + p["bu"]


def swished(p: dict[str, Tensor], read: Tensor) -> Tensor:
    inner = read @ p["D"].T + p["bd"]
    return inner * torch.sigmoid(inner) @ p["U"].T + p["bu"]


def combined(values: dict[str, Tensor], path: str, query: Tensor, added: list[Tensor]) -> Tensor:
    """Attention of one query over what the adapters add, as AdapterHub's BertFusion has it."""
    f = under(values, f"{path}.f")
    stacked = torch.stack(added, 2)
    scores = torch.einsum("btd,btnd->btn", query @ f["Q"].T + f["bq"], stacked @ f["K"].T + f["bk"])
    return torch.einsum("btn,btnd->btd", scores.softmax(-1), stacked @ f["V"].T)


def pfeiffer_fusion(
    values: dict[str, Tensor], path: str, h: Tensor, x: Tensor, norm: Norm
) -> Tensor:
    read = norm(h + x)
    added = [up(under(values, f"{path}.{adapter}"), read) for adapter in "ab"]
    return h + combined(values, path, read, added)


def houlsby_fusion(
    values: dict[str, Tensor], path: str, h: Tensor, x: Tensor, norm: Norm
) -> Tensor:
    added = [swished(under(values, f"{path}.{adapter}"), h) for adapter in "ab"]
    return h + combined(values, path, h, added)


@pytest.mark.parametrize("name", ["bert_mlm", "gpt_neox", "t5"])
def test_outputs_and_gradients_are_those_of_the_published_formula(name: str) -> None:
    ours = fused(name)
    values = leaves(ours)
    with rewritten(
        name, ZOO[name].build(), ("ffn",), lambda *given: pfeiffer_fusion(values, *given)
    ) as module:
        expected = module(**ZOO[name].inputs(3, 6))
    readout(expected).backward()
    output = ours(**ZOO[name].inputs(3, 6))
    readout(output).backward()
    size = max(1.0, float(expected[0].detach().abs().max()))
    torch.testing.assert_close(output[0], expected[0], rtol=0, atol=1e-6 * size)
    for key, value in ours.learnt().items():
        if ".f." in key:
            assert value.grad is not None, key
            torch.testing.assert_close(value.grad, values[key].grad, rtol=0, atol=1e-5, msg=key)
        else:
            assert value.grad is None, f"{key} is not the fusion's"


@pytest.mark.parametrize("name", ["bert_mlm"])
def test_adapters_that_read_the_output_are_queried_by_it(name: str) -> None:
    ours = fused(name, "houlsby", normed=False)
    values = dict(ours.learnt())
    with rewritten(
        name, ZOO[name].build(), ("self", "ffn"), lambda *given: houlsby_fusion(values, *given)
    ) as module:
        expected = logits(module, name)
    torch.testing.assert_close(logits(ours, name), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["bert_mlm"])
def test_taking_the_fusion_out_gives_back_the_adapters(name: str) -> None:
    before = two(name)
    ours = over(before)
    after = ps.eject(ours, "f")
    assert torch.equal(logits(after, name), logits(before, name))
    assert {n for n, p in after.named_parameters() if p.requires_grad} == set(before.learnt())
    assert ps.eject(ours) is captured(name)


@pytest.mark.parametrize("name", ["bert_mlm"])
def test_a_saved_fusion_reloads_exactly_with_its_adapters_frozen(name: str, tmp_path: Path) -> None:
    ours = fused(name)
    ours.save(tmp_path / "fusion")
    again = ps.load(tmp_path / "fusion", base=captured(name))
    assert torch.equal(logits(again, name), logits(ours, name))
    trained = {n for n, p in again.named_parameters() if p.requires_grad}
    assert trained == {n for n in ours.learnt() if ".f." in n}


@pytest.mark.parametrize("name", ["bert_mlm"])
def test_values_start_near_themselves_and_are_drawn_there(name: str) -> None:
    fresh = ps.apply(two(name), "adapter_fusion", name="f", adapters=["a", "b"])
    values = [v for n, v in fresh.learnt().items() if n.endswith(".f.ffn.V")]
    start = torch.eye(32) + 1e-6 * (1 - torch.eye(32))
    assert len(values) == 2
    assert all(torch.equal(value, start) for value in values)
    ours = fused(name)
    drawn = [v for n, v in ours.learnt().items() if n.endswith(".f.ffn.V")]
    expected = 0.01 * sum((torch.eye(32) - v).pow(2).sum() for v in drawn)
    torch.testing.assert_close(ours.penalty(), expected)


@pytest.mark.parametrize("name", ["bert_mlm"])
def test_training_a_fusion_lowers_the_loss_and_leaves_the_adapters_alone(name: str) -> None:
    model = ps.apply(two(name), "adapter_fusion", name="f", adapters=["a", "b"]).train()
    before = {n: v.detach().clone() for n, v in model.learnt().items()}
    inputs = ZOO[name].inputs(3, 6)
    inputs["labels"] = inputs["input_ids"].flip(1)
    losses = losses_of(model, inputs, rate=5e-3)
    assert losses[-1] < losses[0] - 0.02
    assert {n for n, v in model.learnt().items() if not torch.equal(v, before[n])} == {
        n for n in before if ".f." in n
    }


@pytest.mark.parametrize("name", ["llama"])
def test_any_adapters_of_one_site_can_be_combined_by_a_rule_of_ones_own(name: str) -> None:
    lora = randomise(ps.apply(captured(name), "lora_qv", name="a", rank=2, alpha=4), scale=0.3)
    both = ps.apply(lora, "dora", name="b", rank=2, alpha=4)
    randomise(both, seed=4, scale=0.3)
    ours = ps.apply(both, ps.parse_rules(MEAN), adapters=["a", "b"])
    reference = ZOO[name].build()
    values = both.learnt()
    with torch.no_grad():
        for layer, part in ((n, p) for n in range(2) for p in ("q_proj", "v_proj")):
            linear = reference.get_submodule(f"model.layers.{layer}.self_attn.{part}")
            path = f"model.layers.{layer}.self_attn.{part}"
            a, b = under(values, f"{path}.a"), under(values, f"{path}.b")
            first = linear.weight + 2 * b_a(a)
            second = linear.weight + 2 * b_a(b)
            second = b["m"][:, None] * second / second.norm(dim=1, keepdim=True)
            linear.weight.copy_((first + second) / 2)
    torch.testing.assert_close(logits(ours, name), logits(reference, name), rtol=0, atol=2e-6)


def b_a(p: dict[str, Tensor]) -> Tensor:
    return p["B"] @ p["A"]


@pytest.mark.parametrize("name", ["bert_mlm"])
def test_a_fusion_of_nothing_or_of_a_misspelt_adapter_is_refused(name: str) -> None:
    with pytest.raises(ps.SurgeryError, match=r"PSG340(.|\n)*a, b"):
        ps.apply(two(name), "adapter_fusion")
    with pytest.raises(ps.SurgeryError, match=r"PSG340.*'bb'(.|\n)*'b'"):
        ps.apply(two(name), "adapter_fusion", adapters=["a", "bb"])


@pytest.mark.parametrize("name", ["bert_mlm"])
def test_an_adapter_in_a_fusion_is_not_taken_out_alone(name: str) -> None:
    with pytest.raises(ps.SurgeryError, match=r"PSG342.*'f' is over 'a'"):
        ps.eject(fused(name), "a")


@pytest.mark.parametrize("name", ["bert_mlm"])
def test_adapters_of_other_sites_are_not_combined(name: str) -> None:
    uneven = ps.apply(two(name), "houlsby", name="c")
    with pytest.raises(ps.SurgeryError, match=r"PSG341.*'c' also cuts at .*attention"):
        ps.apply(uneven, "adapter_fusion", adapters=["a", "c"])
    apart = ps.apply(two(name), "lora_qv", name="c")
    with pytest.raises(ps.SurgeryError, match=r"PSG341.*no site in common"):
        ps.apply(apart, "adapter_fusion", adapters=["a", "c"])


@pytest.mark.parametrize("name", ["bert_mlm"])
def test_folding_a_fusion_is_refused(name: str) -> None:
    with pytest.raises(ps.SurgeryError, match="PSG401"):
        ps.fold(fused(name))


@pytest.mark.parametrize("name", ["bert_mlm"])
def test_rows_of_a_padded_batch_may_use_the_fusion_and_its_adapters(name: str) -> None:
    ours, inputs = fused(name), ZOO[name].inputs(3, 6)
    inputs["attention_mask"][1, 4:] = 0
    expected = []
    for row, adapter in enumerate(("f", "a", None)):
        with ours.only(*([adapter] if adapter else [])), torch.no_grad():
            expected.append(ours(**inputs)[0][row])
    mixed = ours(**inputs, adapters=["f", "a", None])[0]
    torch.testing.assert_close(mixed, torch.stack(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["bert_mlm"])
def test_adapters_and_their_fusion_are_applied_in_one_go(name: str) -> None:
    ours = ps.apply(captured(name), ["pfeiffer", "adapter_fusion"], adapters=["pfeiffer"])
    assert ours.adapters == ("pfeiffer", "adapter_fusion")
    assert not any(value.requires_grad for value in ours.learnt("pfeiffer").values())
    assert any(value.requires_grad for value in ours.learnt("adapter_fusion").values())
    with pytest.raises(ps.SurgeryError, match="PSG340"):
        ps.apply(captured(name), ["adapter_fusion", "pfeiffer"], adapters=["pfeiffer"])


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("over: $others, rewrite: 'mean(outputs, -2)'", "PSG120.*others"),
        ("over: [a], rewrite: 'mean(outputs, -2)', fold: W", "PSG106.*folds into nothing"),
        ("over: [a], rewrite: {x: 'x + mean(outputs, -2)'}", "PSG106.*rewrites y alone"),
        ("rewrite: 'mean(outputs, -2)'", "PSG113.*outputs"),
    ],
)
def test_a_rule_over_adapters_that_cannot_be_is_refused(body: str, code: str) -> None:
    with pytest.raises(ps.SurgeryError, match=code):
        ps.parse_rules(f"name: t\nwith: {{adapters: []}}\nrules: [{{match: linear, {body}}}]")
