"""Changes of weights said as one LoRA adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn

import peftsurgery as ps
from peftsurgery.surgery.fold.as_lora import lora_with_error
from tests.parity.models import base, captured
from tests.parity.training import logits

HADAMARD = """
name: hadamard
about: A product of two low-rank matrices, entry by entry.
with: {rank: 2, alpha: 4}
rules:
  - match: linear
    where: {role: attn.v}
    params:
      A: {shape: [rank, in]}
      B: {shape: [out, rank]}
      C: {shape: [rank, in]}
      D: {shape: [out, rank]}
    rewrite: y + alpha / rank * linear(x, (B @ A) * (D @ C))
    fold: W + alpha / rank * ((B @ A) * (D @ C))
"""


def trained(name: str, rules: Any, **settings: Any) -> ps.OperatedModel:
    """Rules on a small model, with all that they train moved at random."""
    return moved(ps.apply(captured(name), rules, **settings))


def moved(model: ps.OperatedModel) -> ps.OperatedModel:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * noise.to(parameter))
    return model.eval()


@pytest.mark.parametrize(
    ("name", "rules", "settings"),
    [
        ("llama", "dora", {}),
        ("llama", "pissa", {"rank": 3}),
        ("llama", HADAMARD, {}),
        ("gpt2", "lora_qv", {}),  # a fused weight, stored as (in, out)
        ("gpt2", "lora_embedding", {}),  # tied to the head, which stays as it is
        ("t5", "adalora", {}),
        ("opt", "rslora", {"rank": 5}),
    ],
    ids=lambda value: value if isinstance(value, str) and "\n" not in value else "",
)
def test_peft_reads_the_lora_and_computes_what_the_method_computes(
    name: str, rules: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    rules = ps.parse_rules(rules) if "\n" in rules else rules
    operated = trained(name, rules, **settings)
    made = ps.as_lora(operated)
    assert made.report.lost == {}
    ps.to_peft(made, tmp_path / "lora")
    theirs = PeftModel.from_pretrained(base(name), tmp_path / "lora").eval()
    wanted = logits(operated)
    assert (logits(theirs) - wanted).abs().max() < 2e-6
    assert (logits(captured(name)) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("wish", [{"rank": 2}, {"energy": 0.8}])
def test_what_a_smaller_rank_keeps_is_what_numpy_keeps(wish: dict[str, Any]) -> None:
    operated = trained("llama", "dora")
    made, errors = lora_with_error(operated, **wish)
    plain, folded = base("llama"), ps.fold(operated)
    total, missing = 0.0, 0.0
    for name, error in errors.items():
        change = weight(folded, name) - weight(plain, name)
        values = np.linalg.svd(change, compute_uv=False)
        share = np.cumsum(values**2) / np.sum(values**2)
        rank = wish.get("rank") or int(np.argmax(share >= wish["energy"])) + 1
        assert error.rank == rank
        assert error.lost == pytest.approx(np.sqrt(1 - share[rank - 1]), rel=1e-3)
        left = weight(ps.fold(made), name) - weight(plain, name)
        assert np.linalg.matrix_rank(left, tol=1e-4 * values[0]) == rank
        total, missing = total + np.sum(values**2), missing + np.sum(values[rank:] ** 2)
    assert made.report.lost["dora"] == pytest.approx(np.sqrt(missing / total), rel=1e-3)
    assert "lacks" in str(made.report)


def weight(module: nn.Module, name: str) -> Any:
    return module.get_parameter(name).detach().double().numpy()


def test_two_active_adapters_are_one_and_an_inactive_one_is_left_out() -> None:
    two = moved(ps.apply(trained("llama", "lora_qv", rank=2), "pissa", rank=3))
    two = moved(ps.apply(two, "lora_all_linear", name="unused"))
    two.choose("lora_qv", "pissa")
    made, errors = lora_with_error(two)
    assert made.adapters == ("as_lora",)
    assert {error.rank for error in errors.values()} == {2 + 2 * 3}
    assert (logits(made) - logits(two)).abs().max() < 2e-6


def test_a_bf16_base_is_not_rounded_on_the_way() -> None:
    plain = base("llama").to(torch.bfloat16)
    operated = ps.apply(ps.capture(plain), "dora", rank=2)
    with torch.no_grad():
        for cut in operated.cuts:
            operated.get_parameter(cut.parameters["B"]).normal_(std=1e-4)
    made = ps.as_lora(operated)
    (cut,) = (c for c in operated.cuts if c.placed.module.endswith("layers.0.self_attn.v_proj"))
    W, A, B, m = (
        value.detach().double()
        for value in (
            plain.get_parameter(f"{cut.placed.module}.weight"),
            *(operated.get_parameter(cut.parameters[name]) for name in ("A", "B", "m")),
        )
    )
    adapted = W + cut.numbers["alpha"] / 2 * B @ A
    wanted = (m / adapted.norm(dim=1))[:, None] * adapted - W
    given = {c.placed.module: c.parameters for c in made.cuts}[cut.placed.module]
    found = made.get_parameter(given["B"]).double() @ made.get_parameter(given["A"]).double()
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_convolutions_and_embeddings_have_their_own_form() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=2)).eval()
    x = torch.randn(2, 3, 9, 9)
    graph = ps.capture(module, inputs=(x,))
    plain = moved(ps.apply(graph, "lora_conv", rank=2, where={"paths": ["0"]}))
    made = ps.as_lora(plain)
    with torch.no_grad():
        assert (made(x) - plain(x)).abs().max() < 1e-5
    grouped = moved(ps.apply(graph, "lora_conv", rank=2, where={"paths": ["1"]}))
    with pytest.raises(ps.SurgeryError, match="grouped"):
        ps.as_lora(grouped)


@pytest.mark.parametrize(
    ("rules", "wish", "code"),
    [
        ("dora", {"rank": 0}, "PSG317"),
        ("dora", {"energy": 0.0}, "PSG317"),
        ("dora", {"energy": float("nan")}, "PSG317"),
        ("dora", {"rank": 2, "energy": 0.5}, "PSG317"),
        ("dora", {"rank": 2.0}, "PSG904"),
        ("bitfit", {}, "PSG419"),
        ("prefix_tuning", {}, "PSG401"),
    ],
)
def test_what_no_lora_can_say_is_refused(rules: str, wish: dict[str, Any], code: str) -> None:
    name = "opt" if rules == "bitfit" else "llama"
    with pytest.raises(ps.SurgeryError, match=code):
        ps.as_lora(trained(name, rules), **wish)


def test_a_change_of_nothing_and_one_that_is_not_finite_are_refused() -> None:
    with pytest.raises(ps.SurgeryError, match="PSG415"):
        ps.as_lora(ps.apply(captured("llama"), "lora_qv"))
    operated = trained("llama", "lora_qv")
    with torch.no_grad():
        operated.get_parameter(operated.cuts[0].parameters["B"])[0, 0] = torch.inf
    with pytest.raises(ps.SurgeryError, match="PSG403"):
        ps.as_lora(operated)
