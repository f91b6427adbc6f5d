"""Roles of kinds of attention that the zoo does not have, by tables written by hand.

The tables say what the models' own code does: which rows of which weight become whose queries,
keys and values. What a role is for is probed too: queries and keys make the probabilities, values
do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.anatomy import survey
from peftsurgery.errors import SurgeryError
from tests.anatomy.tables import Part, Roles, Rows, merge, under
from tests.anatomy.test_roles import Found, as_found
from tests.models.zoo import hf

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "pad_token_id": 0,
}
LATENT = {
    **SIZES,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "first_k_dense_replace": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
"""Keys of 12 rows a head, 4 of which are rotary and the same for all heads, and values of 6."""


@dataclass(frozen=True)
class Kind:
    """A model of two or more layers, and the roles of its attention by module; # is a layer."""

    build: Callable[[], nn.Module]
    layers: int
    roles: Roles


def heads(module: str, start: int, end: int) -> Part:
    """Rows from start to end of each of four heads of 14 rows."""

    def pick(rows: Rows) -> Rows:
        return rows.reshape(4, 14)[:, start:end]

    return Part(module, 56, pick)


def latent(queries: dict[str, Any]) -> Roles:
    """Multi-head latent attention: keys and values of a latent, and a rotary part of the keys."""
    rotary = Part("kv_a_proj_with_mqa", 20, lambda rows: rows[16:])
    return under(
        "layers.#.self_attn",
        attn_kv="kv_b_proj",
        attn_k=(heads("kv_b_proj", 0, 8), rotary),
        attn_v=heads("kv_b_proj", 8, 14),
        attn_o="o_proj",
        **queries,
    )


LOW_RANK = {"attn_q": "q_b_proj", "none": ("q_a_proj", "kv_a_proj_with_mqa")}
DIRECT = {"attn_q": "q_proj", "none": "kv_a_proj_with_mqa"}
PLAIN = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_o": "o_proj"}

KINDS = {
    "deepseek_v3": Kind(
        hf("DeepseekV3Model", "DeepseekV3Config", **LATENT, q_lora_rank=16), 2, latent(LOW_RANK)
    ),
    "deepseek_v3 without a latent of queries": Kind(
        hf("DeepseekV3Model", "DeepseekV3Config", **LATENT, q_lora_rank=None), 2, latent(DIRECT)
    ),
    "deepseek_v2": Kind(  # its rotation is complex
        hf(
            "DeepseekV2Model",
            "DeepseekV2Config",
            **LATENT,
            q_lora_rank=16,
            topk_method="greedy",
        ),
        2,
        latent(LOW_RANK),
    ),
    "minicpm3": Kind(
        hf("MiniCPM3Model", "MiniCPM3Config", **LATENT, q_lora_rank=16), 2, latent(LOW_RANK)
    ),
    "youtu": Kind(hf("YoutuModel", "YoutuConfig", **LATENT, q_lora_rank=16), 2, latent(LOW_RANK)),
    "glm4_moe_lite": Kind(
        hf("Glm4MoeLiteModel", "Glm4MoeLiteConfig", **LATENT, q_lora_rank=16), 2, latent(LOW_RANK)
    ),
    "diffllama": Kind(  # the difference of two cores, which read the same projections
        hf("DiffLlamaModel", "DiffLlamaConfig", **SIZES, num_hidden_layers=2),
        2,
        under("layers.#.self_attn", **PLAIN),
    ),
    "zaya": Kind(  # queries and keys are mixed by convolutions, and averaged with each other
        hf(
            "ZayaModel",
            "ZayaConfig",
            **SIZES,
            num_hidden_layers=2,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            router_hidden_size=16,
        ),
        2,
        under(
            "layers.#.self_attn",
            attn_q="qkv_proj.q_proj",
            attn_k="qkv_proj.k_proj",
            attn_v=("qkv_proj.v_proj_current", "qkv_proj.v_proj_delayed"),
            attn_o="o_proj",
        ),
    ),
    "gemma4": Kind(  # the last two layers take keys and values of the first two
        hf(
            "Gemma4TextModel",
            "Gemma4TextConfig",
            **SIZES,
            num_hidden_layers=4,
            num_kv_shared_layers=2,
            head_dim=8,
            global_head_dim=8,
            vocab_size_per_layer_input=99,
            hidden_size_per_layer_input=8,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
        4,
        merge(
            under("layers.#.self_attn", attn_q="q_proj", attn_o="o_proj"),
            under("layers.0.self_attn", attn_k="k_proj", attn_v="v_proj"),
            under("layers.1.self_attn", attn_k="k_proj", attn_v="v_proj"),
        ),
    ),
}


IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 8,
}
POOLING = {  # the head of a vision model, whose query is learned
    "a query that is projected by rows of a weight": (
        hf("SiglipVisionModel", "SiglipVisionConfig", **IMAGE),
        {
            ("attn.q", "attention.in_proj_weight", tuple(range(32))),
            ("attn.kv", "attention.in_proj_weight", tuple(range(32, 96))),
            ("attn.k", "attention.in_proj_weight", tuple(range(32, 64))),
            ("attn.v", "attention.in_proj_weight", tuple(range(64, 96))),
            ("attn.o", "attention.out_proj", None),
        },
        [],
    ),
    "a query that is a parameter": (
        hf("Aimv2VisionModel", "Aimv2VisionConfig", **IMAGE),
        {("attn.k", "k_proj", None), ("attn.v", "v_proj", None)},
        ["attn.q"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", POOLING)
def test_a_head_that_pools_has_keys_and_values(name: str) -> None:
    build, expected, unprojected = POOLING[name]
    torch.manual_seed(0)
    model = ps.capture(build().eval())
    sites = [site for site in survey(model.captures[0]) if site.module.startswith("head")]
    found = {as_found(site) for site in sites if (site.role or "").startswith("attn.")}
    assert {(role, path.removeprefix("head."), rows) for role, path, rows in found} == expected
    report = ps.apply(model, "lora_qv").report
    assert [one for each in report.unprojected for one in each["roles"]] == unprojected


@cache
def captured(name: str) -> ps.GraphModel:
    torch.manual_seed(0)
    return ps.capture(KINDS[name].build().eval())


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_weight_of_attention_has_the_role_the_modeling_code_gives_it(name: str) -> None:
    kind = KINDS[name]
    expected: set[Found] = set()
    for role, entries in kind.roles.items():
        for entry in entries:
            module = entry.module if isinstance(entry, Part) else entry
            rows = entry.rows() if isinstance(entry, Part) else None
            count = kind.layers if "#" in module else 1
            expected |= {(role, module.replace("#", str(i)), rows) for i in range(count)}
    sites = survey(captured(name).captures[0])
    found = {as_found(s) for s in sites if s.kind == "linear" and ".self_attn." in s.module}
    assert sorted(found - expected, key=str) == []
    assert sorted(expected - found, key=str) == []
    cores = [site for site in sites if site.kind == "attention"]
    assert {core.facts["kind"] for core in cores} == {"self"}
    assert all(core.facts["causal"] for core in cores)


CHANGED = """
name: changed
about: Adds a number to what a projection makes.
rules:
  - match: linear
    where: {role: %s, layers: 0}
    rewrite: y + 0.5
    expect: {at_least: 1}
"""


def probabilities(model: ps.GraphModel, role: str | None) -> Tensor:
    """The probabilities of the first core with everything that a role's projections make changed.

    The core is given the positions of keys as its values: what it returns are means of positions.
    """
    rule = """
name: probe
about: Values that say where they stand.
rules:
  - match: attention
    where: {layers: 0}
    rewrite: attention(q, k, places(v))
"""
    changed = [] if role is None else [ps.parse_rules(CHANGED % role)]
    operated: ps.GraphModel = model
    for rules in (*changed, ps.parse_rules(rule)):
        operated = ps.apply(operated, rules)
    ids = torch.arange(1, 8).reshape(1, 7)
    with torch.no_grad():
        result: Tensor = operated(input_ids=ids).last_hidden_state
    return result


def places(v: Tensor) -> Tensor:
    """Values (batch, heads, tokens, features) that are the numbers of their tokens."""
    return torch.ones_like(v).cumsum(2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2", "diffllama"])
def test_values_leave_the_probabilities_as_they_are(name: str) -> None:
    ps.operator("places")(places)
    plain = probabilities(captured(name), None)
    assert torch.equal(probabilities(captured(name), "attn.v"), plain)
    assert not torch.allclose(probabilities(captured(name), "attn.k"), plain)
    assert not torch.allclose(probabilities(captured(name), "attn.q"), plain)


@pytest.mark.slow
def test_a_rule_is_told_what_a_layer_takes_from_another() -> None:
    model = captured("gemma4")
    report = ps.apply(model, "lora_qv").report
    assert "layers.{2..3}.self_attn has no projection of its own for attn.v" in str(report)
    assert [entry["roles"] for entry in report.to_dict()["unprojected"]] == [["attn.v"]] * 2
    assert report.to_dict()["coverage"]["attn.v"] == {"matched": 2, "of": 2}
    strict = ps.parse_rules(
        """
name: strict
about: Every core is to have values of its own.
rules:
  - match: linear
    where: {role: [attn.q, attn.v]}
    expect: {per_attention: 2, complete: true}
    rewrite: 2 * y
"""
    )
    with pytest.raises(SurgeryError) as caught:
        ps.apply(model, strict)
    assert caught.value.code == "PSG302"
    assert "layers.2.self_attn" in caught.value.message
