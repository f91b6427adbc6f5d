"""Rules at rows of a weight whose other rows are multiplied with something else."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import peftsurgery as ps

WIDTH = 16
Q, K, V = slice(0, WIDTH), slice(WIDTH, 2 * WIDTH), slice(2 * WIDTH, 3 * WIDTH)


def decoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(WIDTH, 4, 24, batch_first=True)
    return nn.TransformerDecoder(layer, 2).eval()


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"tgt": torch.randn(2, 5, WIDTH), "memory": torch.randn(2, 7, WIDTH)}


@cache
def captured() -> ps.GraphModel:
    return ps.capture(decoder(), inputs=inputs())


def trained(rule: str) -> ps.GraphModel:
    operated = ps.apply(captured(), rule)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in operated.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return operated


def test_the_fold_changes_the_rows_of_queries_and_values_alone() -> None:
    operated = trained("lora_qv")
    folded, before = ps.fold(operated).state_dict(), decoder().state_dict()
    added = dict(operated.named_parameters())
    for layer in (0, 1):
        at = f"layers.{layer}.multihead_attn"
        weight, old = folded[f"{at}.in_proj_weight"], before[f"{at}.in_proj_weight"]
        assert torch.equal(weight[K], old[K])
        for rows, part in ((Q, "q"), (V, "v")):
            A, B = (added[f"{at}.lora_qv.{part}.{name}"].detach() for name in "AB")
            expected = old[rows].double() + 2 * (B.double() @ A.double())
            assert torch.allclose(weight[rows].double(), expected, atol=2e-7)


@pytest.mark.parametrize("rule", ["lora_attention", "lora_all_linear", "dora", "bitfit"])
def test_the_folded_model_computes_what_the_operated_one_does(rule: str) -> None:
    operated = trained(rule)
    expected = operated(**inputs())
    assert not torch.allclose(decoder()(**inputs()), expected, atol=1e-3)
    assert torch.allclose(ps.fold(operated)(**inputs()), expected, atol=1e-5)


def test_a_scale_of_a_part_is_a_scale_of_the_product_by_hand() -> None:
    rules = ps.parse_rules(
        """
name: scaled
about: Scales the keys of the attention to the memory.
rules:
  - match: linear
    where: {role: attn.k, path: ".*multihead_attn"}
    expect: {exactly: 2}
    rewrite: 3 * y
    fold: {W: 3 * W, b: 3 * b}
"""
    )
    by_hand = decoder()
    with torch.no_grad():
        for name, parameter in by_hand.named_parameters():
            if "multihead_attn.in_proj" in name:
                parameter[K] *= 3
    operated = ps.apply(captured(), rules)
    assert torch.allclose(operated(**inputs()), by_hand(**inputs()), atol=1e-6)
    for name, value in ps.fold(operated).state_dict().items():
        assert torch.equal(value, by_hand.state_dict()[name])


def test_gradients_are_those_of_the_rows() -> None:
    operated = trained("lora_qv")
    operated(**inputs()).square().sum().backward()
    added = dict(operated.named_parameters())
    by_hand = decoder()
    with torch.no_grad():
        for name, weight in by_hand.named_parameters():
            if name.endswith("in_proj_weight"):
                at = name.removesuffix("in_proj_weight")
                for rows, part in ((Q, "q"), (V, "v")):
                    A, B = (added[f"{at}lora_qv.{part}.{n}"] for n in "AB")
                    weight[rows] += 2 * B @ A
    by_hand(**inputs()).square().sum().backward()
    for layer in (0, 1):
        at = f"layers.{layer}.multihead_attn"
        whole = dict(by_hand.named_parameters())[f"{at}.in_proj_weight"].grad
        assert whole is not None
        for rows, part in ((Q, "q"), (V, "v")):
            A, B = (added[f"{at}.lora_qv.{part}.{name}"] for name in "AB")
            assert A.grad is not None
            assert B.grad is not None
            assert torch.allclose(A.grad, 2 * B.T @ whole[rows], atol=2e-4)
            assert torch.allclose(B.grad, 2 * whole[rows] @ A.T, atol=2e-4)


def test_a_surgery_of_parts_is_saved_and_loaded(tmp_path: Path) -> None:
    operated = trained("lora_qv")
    operated.save(tmp_path / "surgery")
    names = load_file(tmp_path / "surgery" / "adapter.safetensors").keys()
    assert "layers.0.multihead_attn.lora_qv.q.A" in names
    again = ps.load(tmp_path / "surgery", base=captured())
    assert torch.equal(again(**inputs()), operated(**inputs()))
    with pytest.raises(ps.SurgeryError) as caught:
        ps.to_peft(operated, tmp_path / "peft")
    assert caught.value.code.startswith("PSG5")
    assert not (tmp_path / "peft").exists()
