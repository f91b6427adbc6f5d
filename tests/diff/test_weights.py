"""What weights became, against numpy and against what was done to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import peftsurgery as ps
from peftsurgery.capture.fingerprint import in_memory
from peftsurgery.diff.comparison import diff
from peftsurgery.diff.tensor_change import measure_change
from peftsurgery.diff.weights import compare_weights, weight_entries
from tests.diff.models import Recipe, build

INPUTS = {"ids": torch.arange(10).reshape(2, 5)}


def test_the_measures_are_those_of_numpy() -> None:
    a, b = torch.randn(40, 24), torch.randn(40, 24)
    found = measure_change(a, b)
    one, other = a.double().numpy(), b.double().numpy()
    values = np.linalg.svd(other - one, compute_uv=False)
    assert found.verdict == "dense"
    assert found.relative == pytest.approx(
        np.linalg.norm(other - one) / np.linalg.norm(one), rel=1e-5
    )
    assert found.largest == pytest.approx(np.abs(other - one).max(), rel=1e-6)
    assert found.sign_flips == pytest.approx((np.sign(one) != np.sign(other)).mean())
    ulps = np.abs(other - one) / np.spacing(np.maximum(abs(one), abs(other)).astype(np.float32))
    assert found.ulps == pytest.approx(ulps.max(), rel=1e-4)
    assert found.top_share == pytest.approx(values[0] ** 2 / (values**2).sum(), rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 4, 24])
def test_a_folded_adapter_has_its_rank(rank: int, dtype: torch.dtype) -> None:
    weight = (0.1 * torch.randn(160, 128)).to(dtype)
    update = torch.randn(160, rank) @ torch.randn(rank, 128) / 100
    found = measure_change(weight, (weight.float() + update).to(dtype))
    assert (found.verdict, found.rank) == ("low-rank", rank)


def test_a_rounding_is_no_change_of_meaning() -> None:
    weight = torch.randn(64, 48)
    assert measure_change(weight, weight.clone()).verdict == "identical"
    assert measure_change(weight, weight.bfloat16()).verdict == "rounding"
    near = torch.nextafter(weight, torch.tensor(9.0))
    assert measure_change(weight, near).ulps == 1
    assert measure_change(weight.bfloat16(), weight.bfloat16().float()).verdict == "identical"


def test_nan_and_inf_are_counted() -> None:
    weight = torch.randn(8, 8)
    broken = weight.clone()
    broken[0, :2], broken[1, 1] = float("nan"), float("inf")
    found = measure_change(weight, broken)
    assert (found.verdict, found.not_finite) == ("not finite", (0, 3))


def told(a: nn.Module, b: nn.Module) -> list[str]:
    one, other = (ps.capture(model, inputs=INPUTS) for model in (a, b))
    found = diff(one, other, weights=True)
    assert bool(found) == bool(found.summary.lines)
    assert not found.summary.differs["structure"]
    return [str(line) for line in found.summary.lines]


def test_layers_made_anew_swapped_and_left_alone_are_told_apart() -> None:
    plain, fresh, swapped = (build(Recipe()) for _ in range(3))
    assert told(plain, build(Recipe())) == []
    with torch.no_grad():
        fresh.layers[1].mlp.up.weight.normal_()
    (line,) = told(plain, fresh)
    assert line.startswith("~ layers.1.mlp.up.weight: dense change")
    swapped.layers = nn.ModuleList([swapped.layers[i] for i in (1, 0, 2)])
    lines = told(plain, swapped)
    assert "~ layers.0.attn.q.weight: is what layers.1.attn.q.weight was" in lines
    assert "~ layers.1.attn.q.weight: is what layers.0.attn.q.weight was" in lines
    assert not [line for line in lines if "layers.2" in line]


def test_a_cast_of_all_is_one_line_and_anything_else_is_not_hidden_in_it() -> None:
    sides = [build(Recipe()), build(Recipe(dtype=torch.bfloat16))]
    one, other = ({k: in_memory(v) for k, v in each.state_dict().items()} for each in sides)
    ((part, sign, where, text),) = weight_entries(compare_weights(one, other, {}))
    assert (part, sign, where) == ("weight", "~", "")
    largest = max(
        float((a - b.float()).norm() / a.norm())
        for a, b in zip(sides[0].state_dict().values(), sides[1].state_dict().values(), strict=True)
    )
    assert text.startswith(f"all {len(one)} tensors: a rounding, F32 → BF16, up to ")
    assert float(text.split()[-5]) == pytest.approx(100 * largest, rel=0.05)
    with torch.no_grad():
        sides[1].layers[1].mlp.up.weight.mul_(2)
    told = {where: text for _, _, where, text in weight_entries(compare_weights(one, other, {}))}
    assert told["layers.1.mlp.up.weight"].endswith(", 100 % of the norm")
    assert len(told) == len(one)


def test_a_fold_of_an_adapter_is_low_rank_where_it_was() -> None:
    plain = build(Recipe())
    graph = ps.capture(plain, inputs=INPUTS)
    operated = ps.apply(graph, "lora_qv", rank=1)
    with torch.no_grad():
        for name, parameter in operated.named_parameters():
            if "lora_qv" in name:
                parameter.normal_()
    lines = told(plain, ps.fold(operated))
    assert len(lines) == 2
    for part, line in zip("qv", lines, strict=True):
        assert line.startswith(f"~ layers.{{0..2}}.attn.{part}.weight: low-rank (rank 1)")
        assert line.endswith("×3")


def test_what_an_adapter_trained_of_the_base_is_compared_by_value() -> None:
    graph = ps.capture(build(Recipe()), inputs=INPUTS)
    operated = ps.apply(graph, "bitfit")
    assert not operated.diff(weights=True).summary.differs["weights"]
    with torch.no_grad():
        operated.get_parameter("layers.1.mlp.up.bias").add_(1)
    lines = [line for line in operated.diff(weights=True).summary.lines if line.part == "weight"]
    assert [line.where for line in lines] == ["layers.1.mlp.up.bias"]
    operated.choose()
    assert not operated.diff(weights=True).summary.differs["weights"]


def test_a_cast_to_a_dtype_of_smaller_range_is_a_rounding() -> None:
    """Numbers below the smallest normal one of float16 lose digits, and are rounded too."""
    weight = (0.02 * torch.randn(700, 400, generator=torch.Generator().manual_seed(0))).bfloat16()
    found = measure_change(weight, weight.half())
    one, other = (each.double().numpy() for each in (weight, weight.half()))
    unit = np.maximum(np.abs(one) * 2.0**-8, np.spacing(np.float16(0)).astype(np.float64))
    assert np.abs(other - one).max() > 0
    assert np.all(np.abs(other - one) <= unit)
    assert found.verdict == "rounding"
    assert found.ulps <= 1


@pytest.mark.parametrize("share", [0.001, 0.1, 0.2, 1.0])
def test_units_are_those_of_the_changed_numbers_however_many_they_are(share: float) -> None:
    generator = torch.Generator().manual_seed(1)
    one = torch.randn(300, 1000, generator=generator)
    chosen = torch.rand(one.shape, generator=generator) < share
    other = torch.where(chosen, torch.nextafter(one, torch.tensor(9.0)), one)
    assert measure_change(one, other).ulps == 1
    other.view(-1)[chosen.view(-1).nonzero()[-1]] += 0.5
    gaps = np.abs((other.double() - one.double()).numpy())
    units = np.spacing(torch.maximum(one.abs(), other.abs()).numpy())
    assert measure_change(one, other).ulps == pytest.approx((gaps / units).max(), rel=1e-4)
