"""Attention whose softmax has the scores of several products, or puts them together by diagonals.

The tables say what the models' own code does. No rule can call such a core, but its projections are
what those of any other are.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import peftsurgery as ps
from peftsurgery.anatomy import survey
from peftsurgery.anatomy.survey import unread_cores
from peftsurgery.errors import SurgeryError
from tests.models.zoo import hf

SIZES = {"vocab_size": 99, "max_position_embeddings": 64, "pad_token_id": 0}
PAIR = {
    **SIZES,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 0,
}
QV = ("attn.q", "attn.v")
PLAIN = {"q_proj": "attn.q", "k_proj": "attn.k", "v_proj": "attn.v", "out_proj": "attn.o"}
BAND = {
    "self.query": "attn.q",
    "self.key": "attn.k",
    "self.value": "attn.v",
    "output.dense": "attn.o",
}
LED = {
    "longformer_self_attn.query": "attn.q",
    "longformer_self_attn.key": "attn.k",
    "longformer_self_attn.value": "attn.v",
    "output": "attn.o",
}
KINDS = {
    # blocks of four tokens and two global ones, which every block attends to: of two layers the
    # second one's blocks begin in the middle of those of the first
    "blocks": (
        hf("PegasusXModel", "PegasusXConfig", **PAIR, block_size=4, num_global_tokens=2),
        ("encoder.layers.0.self_attn", "encoder.layers.1.self_attn"),
        PLAIN,
    ),
    # a band of two tokens at either side
    "band": (
        hf(
            "LongformerModel",
            "LongformerConfig",
            **SIZES,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=64,
            attention_window=4,
        ),
        ("encoder.layer.0.attention",),
        BAND,
    ),
    "band of an encoder": (
        hf("LEDModel", "LEDConfig", **PAIR, attention_window=4),
        ("encoder.layers.0.self_attn", "encoder.layers.1.self_attn"),
        LED,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_roles_of_cores_in_parts(name: str) -> None:
    build, attentions, expected = KINDS[name]
    graph = ps.capture(build())
    sites = survey(graph.base_capture)
    unread = [module for module in unread_cores(graph.base_capture) if "decoder" not in module]
    assert len(unread) == len(attentions)
    for attention in attentions:
        inside = [s for s in sites if s.kind == "linear" and s.module.startswith(attention)]
        assert {s.module.removeprefix(f"{attention}."): s.role for s in inside} == expected
        # every projection serves this core, also one that serves another core before it
        cores = [set(site.attentions) for site in inside]
        assert len(set.intersection(*cores)) >= 1
    report = ps.apply(graph, "lora_qv").report
    assert all(report.coverage.roles[r].matched == report.coverage.roles[r].of for r in QV)
    assert "is no site" in str(report)


class Blocks(nn.Module):
    """Blocks of three tokens, which see themselves and two learned tokens, by one softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.four = (nn.Linear(8, 8) for _ in range(4))
        self.all, self.values = (nn.Linear(8, 8) for _ in range(2))
        self.known = nn.Parameter(torch.randn(2, 8))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(1, (-1, 3)) for part in (self.one, self.two, self.three))
        keys, values = self.all(self.known), self.values(self.known)
        scores = torch.cat([q @ keys.T.expand(len(x), 1, -1, -1), q @ k.mT], -1)
        p = scores.softmax(-1)
        o = p[..., :2] @ values.expand(len(x), 1, -1, -1) + p[..., 2:] @ v
        result: Tensor = x + self.four(o.flatten(1, 2))
        return result


class Band(nn.Module):
    """Tokens that see themselves and one token at either side, by scores moved in place."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.four = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x) for part in (self.one, self.two, self.three))
        scores = q @ k.mT
        band = scores.new_full((*x.shape[:2], 3), -1e9)
        band[:, 1:, 0] = scores.diagonal(-1, 1, 2)
        band[:, :, 1] = scores.diagonal(0, 1, 2)
        band[:, :-1, 2] = scores.diagonal(1, 1, 2)
        beside = nn.functional.pad(v, (0, 0, 1, 1)).unfold(1, 3, 1)
        o = band.softmax(-1)[:, :, None] @ beside.mT
        result: Tensor = x + self.four(o[:, :, 0])
        return result


FOUR = {"one": "attn.q", "two": "attn.k", "three": "attn.v", "four": "attn.o"}


@pytest.mark.parametrize(
    ("kind", "more"), [(Blocks, {"all": "attn.k", "values": "attn.v"}), (Band, {})]
)
def test_projections_of_parts_train_and_fold_as_any(
    kind: type[nn.Module], more: dict[str, str]
) -> None:
    torch.manual_seed(0)
    model = kind()
    graph = ps.capture(model, {"x": torch.randn(2, 6, 8)})
    sites = survey(graph.base_capture)
    assert {s.module: s.role for s in sites if s.kind == "linear"} == {**FOUR, **more}
    operated = ps.apply(graph, "lora_qv", rank=2, alpha=2)
    weights = dict(model.named_parameters())
    for match in operated.report.matches:
        A, B = (operated.get_parameter(name) for name in sorted(match["added"]))
        nn.init.normal_(B)
        weights[match["parameter"]] = weights[match["parameter"]] + B @ A
    x = torch.randn(3, 9, 8)
    expected = functional_call(model, weights, (x,))
    torch.testing.assert_close(operated(x), expected)
    torch.testing.assert_close(ps.fold(operated)(x), expected)
    with pytest.raises(SurgeryError, match="PSG301"):
        ps.apply(graph, "prefix_tuning")
