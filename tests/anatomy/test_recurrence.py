"""Mixers without a softmax have true roles or none, by tables written from the models' own code."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers.models.kimi_linear.modeling_kimi_linear as kimi
import transformers.models.qwen3_next.modeling_qwen3_next as qwen
import transformers.models.qwen4_exp.modeling_qwen4_exp as qwen4
from torch import Tensor, nn
from torch.nn import functional as F

import peftsurgery as ps
from peftsurgery.anatomy import Placed, survey
from tests.models.captured import captured
from tests.models.zoo import GROUPED, Entry, hf, text

ONE: dict[str, Any] = {**GROUPED, "num_hidden_layers": 1}
FEED = {"gate_proj": "ffn.gate", "up_proj": "ffn.up", "down_proj": "ffn.down"}
DELTA = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, str | None]]] = {
    "mamba2": (
        hf(
            "Mamba2ForCausalLM",
            "Mamba2Config",
            vocab_size=99,
            hidden_size=16,
            num_hidden_layers=1,
            state_size=4,
            num_heads=4,
            head_dim=8,
            n_groups=1,
            chunk_size=2,
            use_cache=False,
        ),
        {"in_proj": "ssm.in", "out_proj": "ssm.out", "lm_head": "lm_head"},
    ),
    "qwen3_next": (
        hf(
            "Qwen3NextForCausalLM",
            "Qwen3NextConfig",
            **ONE,
            **DELTA,
            head_dim=8,
            num_experts=0,
            mlp_only_layers=[0],
            layer_types=["linear_attention"],
        ),
        {
            "in_proj_qkvz": "attn.qkv_gate",
            "in_proj_qkvz.q": "attn.q",
            "in_proj_qkvz.k": "attn.k",
            "in_proj_qkvz.v": "attn.v",
            "in_proj_qkvz.gate": "attn.gate",
            "in_proj_ba": None,
            "out_proj": "attn.o",
            "lm_head": "lm_head",
            **FEED,
        },
    ),
    "qwen4_exp": (  # of four streams, mixed before it and added to after it
        hf(
            "Qwen4ExpForCausalLM",
            "Qwen4ExpTextConfig",
            **ONE,
            **DELTA,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            hc_lowrank=4,
            layer_types=["linear_attention"],
            ple_layer_ids=[],
        ),
        {
            "in_proj_qkv": "attn.qkv",
            "in_proj_qkv.q": "attn.q",
            "in_proj_qkv.k": "attn.k",
            "in_proj_qkv.v": "attn.v",
            "in_proj_z": "attn.gate",
            "in_proj_b": None,
            "in_proj_a": None,
            "out_proj": "attn.o",
            "input_mix_weight_down": None,
            "input_mix_weight_up": None,
            "block_inject_weight": None,
            "gate": "moe.router",
            **FEED,
            "shared_expert_gate": None,
            "lm_head": "lm_head",
        },
    ),
    "lfm2": (
        hf("Lfm2ForCausalLM", "Lfm2Config", **ONE, layer_types=["conv"]),
        {
            "in_proj": None,
            "out_proj": None,
            "w1": "ffn.gate",
            "w3": "ffn.up",
            "w2": "ffn.down",
            "lm_head": "lm_head",
        },
    ),
}


ROWS = torch.arange(96).view(2, 48)
PARTS = {
    # two groups of 8 q, 8 k, 16 v and 16 z each
    "qwen3_next": {
        "q": ROWS[:, :8],
        "k": ROWS[:, 8:16],
        "v": ROWS[:, 16:32],
        "gate": ROWS[:, 32:],
    },
    "qwen4_exp": {"q": torch.arange(16), "k": torch.arange(16, 32), "v": torch.arange(32, 64)},
}


def roles(graph: ps.GraphModel) -> dict[str, str | None]:
    """The roles of linears by the last name of the module, and of the part."""
    return {
        ".".join(filter(None, (site.module.rpartition(".")[2], site.site.label))): site.role
        for site in survey(graph.base_capture)
        if site.kind == "linear"
    }


@pytest.mark.parametrize("name", MODELS)
def test_mixers_have_the_roles_of_the_modeling_code_or_none(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for code in (qwen, qwen4):  # chunks of 64 would be 64 steps to trace
        short = partial(code.torch_chunk_gated_delta_rule, chunk_size=2)
        monkeypatch.setattr(code, "torch_chunk_gated_delta_rule", short)
    make, wanted = MODELS[name]
    entry = Entry(name, make, text)
    graph = ps.capture(entry.build(), entry.inputs(2, 3))
    assert roles(graph) == wanted
    for site in survey(graph.base_capture):
        if site.slice is not None:
            rows = PARTS[name][str(site.site.label)]
            assert site.slice.indices() == rows.flatten().tolist()


class Delta(nn.Module):
    """A gated delta net in its recurrent form, one head, three tokens; projections of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.step, self.beta, self.out = nn.Linear(8, 1), nn.Linear(8, 1), nn.Linear(8, 8)
        self.conv = nn.Conv1d(24, 24, 2, groups=24, padding=1)
        self.rate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.cat([self.a(x), self.b(x), self.c(x)], -1).transpose(1, 2)
        k, v, q = F.silu(self.conv(mixed)[..., :3]).transpose(1, 2).chunk(3, -1)
        q, k = (t * torch.rsqrt((t * t).sum(-1, keepdim=True) + 1e-6) for t in (q, k))
        decay = torch.exp(-self.rate.exp() * F.softplus(self.step(x)))
        beta = torch.sigmoid(self.beta(x))
        state, given = x.new_zeros(len(x), 8, 8), []
        for t in range(3):
            state = state * decay[:, t, :, None]
            change = (v[:, t] - (state * k[:, t, :, None]).sum(1)) * beta[:, t]
            state = state + k[:, t, :, None] * change[:, None]
            given.append((state * q[:, t, :, None]).sum(1))
        y: Tensor = x + self.out(torch.stack(given, 1))
        return y


class Convolved(nn.Module):
    """Two linears about an activation, as in a feed-forward, with a causal convolution between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 8)
        self.conv = nn.Conv1d(12, 12, 3, groups=12)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.pad(self.first(x).transpose(1, 2), (2, 0))
        y: Tensor = x + self.last(F.gelu(self.conv(inner)).transpose(1, 2))
        return y


class Scanned(nn.Module):
    """Two linears and a gated sum over the tokens before, written in place into zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.rate = nn.Parameter(torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        inner, state = self.first(x), torch.zeros(len(x), 12)
        decay = torch.exp(-F.softplus(self.rate) * torch.sigmoid(inner))
        made = torch.zeros_like(inner)
        for t in range(3):
            state = decay[:, t] * state + inner[:, t]
            made[:, t] = state
        y: Tensor = x + self.last(made * F.gelu(self.gate(x)))
        return y


class Spread(nn.Module):
    """A feed-forward of image patches with a depthwise convolution over the image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 8)
        self.conv = nn.Conv2d(12, 12, 3, padding=1, groups=12)

    def forward(self, x: Tensor) -> Tensor:
        image = self.first(x).mT.unflatten(2, (1, 3))
        y: Tensor = x + self.last(F.gelu(self.conv(image).flatten(2).mT))
        return y


class Swish(nn.Module):
    """An activation with a trained slope, spelled with an exponential; tokens are apart."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 8)
        self.slope = nn.Parameter(torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.first(x)
        y: Tensor = x + self.last(inner / (1 + torch.exp(-self.slope * inner)))
        return y


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        (
            Delta,
            {
                "a": "attn.k",
                "b": "attn.v",
                "c": "attn.q",
                "out": "attn.o",
                "step": None,
                "beta": None,
            },
        ),
        (Convolved, {"first": None, "last": None}),
        (Scanned, {"first": "ssm.in", "gate": "ssm.gate", "last": "ssm.out"}),
        (Spread, {"first": "ffn.up", "last": "ffn.down"}),
        (Swish, {"first": None, "last": None}),
    ],
)
def test_what_mixes_tokens_between_two_linears_is_no_feed_forward(
    kind: type[nn.Module], wanted: dict[str, str | None]
) -> None:
    assert roles(ps.capture(kind(), {"x": torch.randn(2, 3, 8)})) == wanted


def test_ia3_scales_no_part_of_a_state_space_model() -> None:
    with pytest.raises(ps.SurgeryError, match="PSG301"):
        ps.apply(captured("mamba"), "ia3")


def sites(graph: ps.GraphModel, role: str) -> list[Placed]:
    return [site for site in survey(graph.base_capture) if site.role == role]


def test_per_channel_decays_and_three_projections_are_an_attention_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = partial(kimi.chunk_kimi_delta_attention, chunk_size=2)
    monkeypatch.setattr(kimi, "chunk_kimi_delta_attention", short)
    make = hf(
        "KimiLinearForCausalLM",
        "KimiLinearConfig",
        **ONE,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        mlp_layer_types=["dense"],
        layer_types=["linear_attention"],
        linear_head_dim=8,
        linear_num_heads=2,
    )
    graph = ps.capture(make(), text(2, 3))
    for letter in "qkvo":
        found = [site.module.rpartition(".")[2] for site in sites(graph, f"attn.{letter}")]
        assert found == [f"{letter}_proj"]
