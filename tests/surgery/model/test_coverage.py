"""Reports say how much of a model the rules reached, as counted in the original's modules."""

from __future__ import annotations

import torch
from torch import nn

import peftsurgery as ps
from tests.models.captured import captured
from tests.models.zoo import ZOO


def shares(model: ps.OperatedModel) -> dict[str, tuple[int, int]]:
    found = model.report.to_dict()["coverage"]
    return {role: (share["matched"], share["of"]) for role, share in found.items()}


def test_coverage_counts_what_the_original_has() -> None:
    model = ZOO["llama"].build()
    linears = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    operated = ps.apply(captured("llama"), "lora_qv")
    found = shares(operated)
    assert found["attn.q"] == found["attn.v"] == (2, 2)
    assert found["attn.k"] == found["ffn.down"] == (0, 2)
    assert found["lm_head"] == found["embed.tokens"] == (0, 1)
    report = operated.report.to_dict()
    assert report["kinds"]["linear"] == {"matched": 4, "of": len(linears)}
    assert report["uncovered"] == []


def test_what_is_cut_whole_is_cut_in_every_part_and_the_other_way_round() -> None:
    parts = shares(ps.apply(captured("gpt2"), "lora_attention"))
    whole = shares(ps.apply(captured("gpt2"), "lora_all_linear"))
    for found in (parts, whole):
        assert [found[f"attn.{part}"] for part in ("q", "k", "v", "qkv")] == [(2, 2)] * 4
    some = shares(ps.apply(captured("gpt2"), "lora_qv"))
    assert [some[f"attn.{part}"] for part in ("q", "k", "v", "qkv")] == [
        (2, 2),
        (0, 2),
        (2, 2),
        (0, 2),
    ]


def test_layers_that_are_covered_alike_are_one_row() -> None:
    model = captured("bart")
    even = ps.apply(model, "lora_qv").report
    stacks = [(row["stack"], row["first"], row["last"]) for row in even.to_dict()["layers"]]
    assert stacks == [("model.decoder.layers", 0, 1), ("model.encoder.layers", 0, 1)]
    decoder, encoder = (row["roles"]["attn.q"] for row in even.to_dict()["layers"])
    assert decoder == {"matched": 2, "of": 2}, "self and cross attention"
    assert encoder == {"matched": 1, "of": 1}
    some = ps.apply(model, "lora_qv", where={"layers": 1}).report
    rows = [
        (row["stack"], row["first"], row["roles"]["attn.q"]["matched"])
        for row in some.to_dict()["layers"]
    ]
    assert rows == [
        ("model.decoder.layers", 0, 0),
        ("model.decoder.layers", 1, 2),
        ("model.encoder.layers", 0, 0),
        ("model.encoder.layers", 1, 1),
    ]
    assert "model.encoder.layers.1: attn.q 1 of 1, attn.k 0 of 1, attn.v 1 of 1" in str(some)


def test_every_adapter_counts() -> None:
    operated = ps.apply(captured("bert"), "lora_qv", name="a")
    operated = ps.apply(operated, "lora_attention", name="b")
    assert shares(operated)["attn.k"] == (2, 2)


def test_parameters_without_a_site_are_named_as_the_original_names_them() -> None:
    model, operated = ZOO["mamba"].build(), ps.apply(captured("mamba"), "lora_all_linear")
    others = ("A_log", "D", "conv1d.weight", "conv1d.bias")
    wanted = {name for name, _ in model.named_parameters() if name.endswith(others)}
    assert set(operated.report.to_dict()["uncovered"]) == wanted
    assert "mixer.A_log" in str(operated.report)


def test_a_weight_that_is_read_past_its_module_trains_and_folds() -> None:
    operated = ps.apply(captured("mamba"), "lora_all_linear", rank=2)
    for parameter in operated.learnt().values():
        nn.init.normal_(parameter, std=0.2)
    assert any(match["role"] == "ssm.dt" for match in operated.report.matches)
    inputs = ZOO["mamba"].inputs(2, 7)
    with torch.no_grad():
        found, folded = operated.eval()(**inputs).logits, ps.fold(operated)(**inputs).logits
        plain = ZOO["mamba"].build()
        for name, parameter in plain.named_parameters():
            owner = name.removesuffix(".weight")
            adapter = operated.learnt()
            if f"{owner}.lora_all_linear.A" in adapter:
                A, B = (adapter[f"{owner}.lora_all_linear.{letter}"] for letter in "AB")
                parameter += 8.0 * (B @ A)  # alpha 16, rank 2
        wanted = plain(**inputs).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(folded, wanted, rtol=0, atol=1e-4)
