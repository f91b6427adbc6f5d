"""Convolutions of single taps are linears where rules ask for roles.

The oracles are torch's own convolutions with the product of the factors added to their kernels, and
for SqueezeBERT a table written by hand from its modeling code.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import SqueezeBertConfig, SqueezeBertForMaskedLM

import peftsurgery as ps
from peftsurgery.anatomy import survey
from peftsurgery.errors import SurgeryError

SHAPES = {1: (7,), 2: (4, 5), 3: (2, 3, 2)}
KERNELS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Attention(nn.Module):
    """Attention over the places of an image or a signal (batch, 8, ...), two heads."""

    def __init__(self, rank: int, fused: bool) -> None:
        super().__init__()
        one = KERNELS[rank]
        self.first = one(3, 8, 1)  # no projection of attention
        self.one, self.two = one(8, 24 if fused else 8, 1), one(8, 8, 1)
        self.three, self.last = one(8, 8, 1), one(8, 8, 1, bias=False)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.fused:  # two heads of q, k and v each
            q, k, v = self.one(x).flatten(2).unflatten(1, (2, 3, 4)).unbind(2)
        else:
            three = (self.one(x), self.two(x), self.three(x))
            q, k, v = (each.flatten(2).unflatten(1, (2, 4)) for each in three)
        scores = (q.mT @ k / 2).softmax(-1)
        result: Tensor = x + self.last((scores @ v.mT).mT.reshape(x.shape))
        return result


def captured(rank: int, fused: bool) -> tuple[Attention, ps.GraphModel]:
    torch.manual_seed(0)
    model = Attention(rank, fused).eval()
    return model, ps.capture(model, {"x": torch.randn(2, 3, *SHAPES[rank])})


@pytest.mark.parametrize("rank", SHAPES)
def test_each_projection_has_its_role(rank: int) -> None:
    _, graph = captured(rank, fused=False)
    roles = {s.role: s.module for s in survey(graph.base_capture) if s.kind == "linear"}
    assert roles == {"attn.q": "one", "attn.k": "two", "attn.v": "three", "attn.o": "last"}
    _, graph = captured(rank, fused=True)
    found = {
        s.role: s.slice and s.slice.indices()
        for s in survey(graph.base_capture)
        if s.kind == "linear"
    }
    assert found == {
        "attn.qkv": None,
        "attn.q": [*range(4), *range(12, 16)],
        "attn.k": [*range(4, 8), *range(16, 20)],
        "attn.v": [*range(8, 12), *range(20, 24)],
        "attn.o": None,
    }


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rank", SHAPES)
def test_what_trains_folds_into_the_kernel(rank: int, fused: bool) -> None:
    model, graph = captured(rank, fused)
    operated = ps.apply(graph, "lora_attention", rank=2, alpha=6)
    for name in operated.report.added:
        nn.init.normal_(operated.get_parameter(name), std=0.3)
    kernels = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    free = []
    for match in operated.report.matches:
        pair = [operated.get_parameter(name) for name in sorted(match["added"])]
        A, B = (each.detach().clone().requires_grad_() for each in pair)
        free += list(zip(pair, (A, B), strict=True))
        change = 3 * (B @ A)
        if match["slice"] is not None:
            part, whole = match["slice"], torch.zeros(24, 8)
            rows = [r for r in range(24) if 0 <= r % 12 - part["start"] < part["length"]]
            change = whole.index_put((torch.tensor(rows),), change)
        name = match["parameter"]
        kernels[name] = kernels[name] + change.reshape(kernels[name].shape)
    assert len(free) == 8
    x = torch.randn(3, 3, *(size + 1 for size in SHAPES[rank]))
    expected = functional_call(model, kernels, (x,))
    torch.testing.assert_close(operated(x), expected, rtol=1e-5, atol=1e-5)
    expected.square().sum().backward()
    operated(x).square().sum().backward()
    for mine, other in free:
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)
    folded = ps.fold(operated)
    for name, kernel in kernels.items():
        torch.testing.assert_close(folded.get_parameter(name), kernel, rtol=0, atol=1e-6)
    assert torch.equal(ps.eject(operated)(x), model(x))


def test_rules_for_all_linears_leave_convolutions_alone() -> None:
    model = nn.Sequential(Attention(1, fused=False), nn.Linear(7, 7))
    graph = ps.capture(model.eval(), {"input": torch.randn(2, 3, 7)})
    assert [m["module"] for m in ps.apply(graph, "lora_all_linear").report.matches] == ["1"]
    why = str(ps.why(graph, "lora_all_linear", "0.one"))
    assert "it is a convolution: only rules that ask for roles or paths" in why
    assert {site.kind for site in ps.sites(graph).where(path="0.one")} >= {"linear", "conv"}


@pytest.mark.parametrize("settings", [{"groups": 2}, {"kernel_size": 3, "padding": 1}])
def test_other_convolutions_are_no_linears(settings: dict[str, int]) -> None:
    model, _ = captured(1, fused=False)
    model.one = nn.Conv1d(8, 8, **{"kernel_size": 1, **settings})
    graph = ps.capture(model.eval(), {"x": torch.randn(2, 3, 8)})
    modules = [s.module for s in survey(graph.base_capture) if s.kind == "linear"]
    assert "one" not in modules
    with pytest.raises(SurgeryError, match="PSG302"):
        ps.apply(graph, "lora_qv")


LAYER = {
    "attention.query": "attn.q",
    "attention.key": "attn.k",
    "attention.value": "attn.v",
    "post_attention.conv1d": "attn.o",
    "intermediate.conv1d": "ffn.up",
    "output.conv1d": "ffn.down",
}


def test_squeezebert_is_folded_on_files_and_unfolded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    groups = dict.fromkeys(
        ("q_groups", "k_groups", "v_groups", "post_attention_groups", "intermediate_groups"), 1
    )
    config = SqueezeBertConfig(
        vocab_size=99,
        hidden_size=32,
        embedding_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        output_groups=1,
        **groups,
    )
    model = SqueezeBertForMaskedLM(config).eval()
    graph = ps.capture(model)
    start = "transformer.encoder.layers"
    found = {s.module: s.role for s in survey(graph.base_capture) if start in s.module and s.role}
    assert found == {f"{start}.{i}.{name}": role for i in (0, 1) for name, role in LAYER.items()}
    model.save_pretrained(tmp_path / "base")
    operated = ps.apply(graph, "lora_qv", rank=2, alpha=2)
    base = load_file(tmp_path / "base" / "model.safetensors")
    expected = dict(base)
    for match in operated.report.matches:
        A, B = (operated.get_parameter(name) for name in sorted(match["added"]))
        nn.init.normal_(B)
        expected[match["parameter"]] = base[match["parameter"]] + (B @ A).detach()[..., None]
    operated.save(tmp_path / "surgery")
    ps.fold_checkpoint(tmp_path / "surgery", tmp_path / "base", tmp_path / "out", reversible=True)
    ps.unfold_checkpoint(tmp_path / "out", tmp_path / "back", base=tmp_path / "base")
    out, back = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "back"))
    assert sum(not torch.equal(out[name], base[name]) for name in base) == 4
    for name, weight in expected.items():
        torch.testing.assert_close(out[name], weight, rtol=0, atol=1e-6)
        assert torch.equal(back[name], base[name])
