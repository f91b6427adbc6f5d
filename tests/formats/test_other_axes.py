"""Weights that are stored by head: XLNet's are adapted, folded on files, and unfolded.

The oracle is transformers' own model, with the product of the factors added to its weights as its
einsums read them: (d_model, heads, head_dim).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import XLNetConfig, XLNetLMHeadModel

import peftsurgery as ps
from peftsurgery.anatomy import survey

ROLES = {
    f"transformer.layer.{layer}.rel_attn.{name}": f"attn.{name}" if name != "r" else None
    for layer in (0, 1)
    for name in "qkvor"
}


def small() -> XLNetLMHeadModel:
    torch.manual_seed(0)
    config = XLNetConfig(vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=48)
    model = XLNetLMHeadModel(config).eval()
    model.config.use_mems_eval = False
    return model


def test_every_weight_of_attention_has_the_role_the_modeling_code_gives_it() -> None:
    sites = survey(ps.capture(small()).base_capture)
    found = {s.parameter: s.role for s in sites if s.kind == "linear" and "rel_attn" in s.module}
    assert found == ROLES
    cores = [site for site in sites if site.kind == "attention"]
    assert [core.facts["kind"] for core in cores] == ["self", "self"]
    assert [core.facts["heads"] for core in cores] == [4, 4]


@pytest.mark.slow
def test_a_fold_on_files_is_what_the_factors_say_and_is_undone(tmp_path: Path) -> None:
    model = small()
    model.save_pretrained(tmp_path / "base")
    operated = ps.apply(ps.capture(model), "lora_attention", rank=2, alpha=2)
    changes: dict[str, Tensor] = {}
    for match in operated.report.matches:
        A, B = (operated.get_parameter(name) for name in sorted(match["added"]))
        torch.nn.init.normal_(A, std=0.1)
        torch.nn.init.normal_(B, std=0.1)
        change = (B @ A).detach()
        if match["role"] == "attn.o":  # einsum sums over features before heads
            changes[match["parameter"]] = change.reshape(32, 8, 4).mT
        else:
            changes[match["parameter"]] = change.mT.reshape(32, 4, 8)
    assert len(changes) == 8
    operated.save(tmp_path / "surgery")
    ps.fold_checkpoint(tmp_path / "surgery", tmp_path / "base", tmp_path / "out", reversible=True)
    ps.unfold_checkpoint(tmp_path / "out", tmp_path / "back", base=tmp_path / "base")
    base, out, back = (
        load_file(tmp_path / name / "model.safetensors") for name in ("base", "out", "back")
    )
    for name, weight in base.items():
        torch.testing.assert_close(out[name], weight + changes.get(name, 0.0), rtol=0, atol=1e-7)
        assert torch.equal(back[name], weight)
    ids = torch.randint(99, (3, 7))
    tuned = XLNetLMHeadModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            tuned(ids).logits, operated(input_ids=ids).logits, rtol=0, atol=1e-5
        )
