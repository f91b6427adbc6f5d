"""What peft gets wrong without a word, and what happens here instead.

Every test first shows that peft still does it: when one fails there, peft has changed.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.errors import SurgeryError
from tests.parity.models import Attention, base, batch, captured, randomise


def adapted(module: nn.Module, folder: Path, **settings: Any) -> Any:
    """peft's model with a random adapter, which is also saved."""
    model = get_peft_model(deepcopy(module), LoraConfig(r=4, lora_alpha=8, **settings)).eval()
    randomise(model, lambda name: "lora_" in name)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def run(model: Any, x: Tensor) -> Tensor:
    result: Tensor = model(x)
    return result


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lora_in_a_transformer_encoder_acts_in_eval_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    module = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(3, 5, 16)
    theirs = adapted(module, tmp_path / "theirs", target_modules=["linear1"])
    plain = run(module, x)
    assert (run(theirs, x) - plain).abs().max() < 1e-5, "peft: skipped by the fast path"
    meant = run(theirs.train(), x)
    assert (meant - plain).abs().max() > 0.01

    ours = ps.from_peft(ps.capture(module, (x,)), tmp_path / "theirs").eval()
    torch.testing.assert_close(run(ours, x), meant, rtol=0, atol=2e-6)
    torch.testing.assert_close(run(ps.fold(ours).train(), x), meant, rtol=0, atol=2e-6)
    with pytest.raises(SurgeryError, match=r"PSG510: 'layers\.0\.linear1' is in a"):
        ps.to_peft(ours, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lora_at_the_out_proj_of_an_attention_is_alive_before_it_is_merged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Attention().eval()
    x = torch.randn(3, 5, 16)
    theirs = adapted(module, tmp_path, target_modules=["out_proj"])
    assert (run(theirs, x) - run(module, x)).abs().max() < 1e-6, "peft: never called"
    meant = run(theirs.merge_and_unload(), x)
    assert (meant - run(module, x)).abs().max() > 0.01

    ours = ps.from_peft(ps.capture(module, (x,)), tmp_path).eval()
    torch.testing.assert_close(run(ours, x), meant, rtol=0, atol=1e-6)


def test_a_typo_among_several_names_is_an_error(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj", "v_prj"])
    get_peft_model(base("llama"), config).save_pretrained(tmp_path)  # peft: no complaint
    with pytest.raises(SurgeryError, match=r"PSG508: .*'v_prj'[^\n]*\n  did you mean 'v_proj'\?"):
        ps.from_peft(captured("llama"), tmp_path)
    rule = "name: typo\nrules: [{{match: linear, where: {{{0}}}, rewrite: 2 * y, fold: 2 * W}}]"
    roles = ps.parse_rules(rule.format("role: [attn.q, attn.vv]"))
    with pytest.raises(SurgeryError, match=r"PSG142: .*'attn\.vv'\n  did you mean 'attn\.v'\?"):
        ps.apply(captured("llama"), roles)
    paths = "paths: [model.layers.0.mlp.up_proj, model.layers.0.mlp.up_prj]"
    with pytest.raises(SurgeryError, match=r"PSG303: .*up_prj'\n  did you mean '.*up_proj'\?"):
        ps.apply(captured("llama"), ps.parse_rules(rule.format(paths)))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_folding_a_tied_head_leaves_the_embeddings_alone(tmp_path: Path) -> None:
    before = base("opt").get_input_embeddings().weight.detach().clone()
    theirs = adapted(base("opt"), tmp_path / "adapter", target_modules=["lm_head"])
    inputs = {"input_ids": batch()["input_ids"]}
    ours = ps.from_peft(captured("opt"), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            ours(**batch()).logits, theirs(**batch()).logits, rtol=0, atol=1e-6
        )
    merged = theirs.merge_and_unload()
    assert not torch.equal(merged.get_input_embeddings().weight, before), "peft: changed both"

    folded = ps.fold(ours)
    assert torch.equal(folded.get_input_embeddings().weight, before)
    assert not torch.equal(folded.get_output_embeddings().weight, before)
    folded.save_pretrained(tmp_path / "folded")
    again = transformers.OPTForCausalLM.from_pretrained(tmp_path / "folded").eval()
    with torch.no_grad():
        expected = ours(**batch()).logits
        torch.testing.assert_close(again(**inputs).logits, expected, rtol=0, atol=1e-6)


class Half(nn.Module):
    """Two linears in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 64), nn.Linear(64, 32, bias=False)
        self.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(torch.relu(self.first(x)))
        return result


def test_a_bf16_weight_is_rounded_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Half().eval()
    theirs = adapted(module, tmp_path, target_modules=["first", "second"])
    x = torch.randn(3, 48).bfloat16()
    ours = ps.from_peft(ps.capture(module, (x,)), tmp_path)
    folded = ps.fold(ours)
    merged = theirs.merge_and_unload(safe_merge=True)
    for name in ("first", "second"):
        A, B = (ours.get_parameter(f"{name}.default.{letter}") for letter in "AB")
        W = module.get_submodule(name).weight
        once = (W.float() + 2.0 * B @ A).bfloat16()
        assert torch.equal(folded.get_submodule(name).weight, once)
        twice = merged.get_submodule(name).weight
        assert (twice != once).float().mean() > 0.05, "peft: the update is rounded, then the sum"
    assert folded.first.bias.dtype == torch.bfloat16


def test_what_eject_gives_back_is_the_base_itself(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Half().eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    theirs = adapted(module, tmp_path, target_modules=["first", "second"])
    theirs.merge_adapter()
    theirs.unmerge_adapter()
    back = theirs.unload().first.weight
    assert (back != before["first.weight"]).float().mean() > 0.05, "peft: added and subtracted"

    x = torch.randn(3, 48).bfloat16()
    captured_once = ps.capture(module, (x,))
    ours = ps.from_peft(captured_once, tmp_path)
    ps.fold(ours)
    ejected = ps.eject(ours)
    assert ejected.state_dict().keys() == before.keys()
    assert all(torch.equal(ejected.state_dict()[name], before[name]) for name in before)
    assert torch.equal(run(ejected, x), run(module, x))
