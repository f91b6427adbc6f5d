"""Large models on the meta device: operated on without any memory for their weights."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

import peftsurgery as ps
from peftsurgery.capture.sources import build_on_meta
from tools.bench.capture import SIZES
from tools.bench.fresh import measured

LAYERS = 12


def wide_llama(layers: int) -> ps.GraphModel:
    """A captured Llama of the 70B's widths with fewer layers."""
    config = LlamaConfig(**{**SIZES["llama-70b"], "num_hidden_layers": layers}, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    return ps.capture(build_on_meta(config))


@pytest.mark.slow
def test_a_rule_on_a_wide_llama_finds_its_sites_and_materialises_nothing_of_the_base() -> None:
    graph = wide_llama(LAYERS)
    base = {name for name, _ in graph.named_parameters()}
    operated = ps.apply(graph, "lora_qv", rank=8)
    modules = [match["module"] for match in operated.report.matches]
    assert sorted(modules) == sorted(
        f"model.layers.{layer}.self_attn.{name}"
        for layer in range(LAYERS)
        for name in ("q_proj", "v_proj")
    )
    tensors = dict(operated.named_parameters())
    assert {name for name, tensor in tensors.items() if tensor.is_meta} == base
    added = sum(tensor.numel() for tensor in operated.learnt().values())
    assert added == LAYERS * 8 * ((8192 + 8192) + (8192 + 1024))
    assert all(tensor.device == torch.device("cpu") for tensor in operated.learnt().values())


def test_equal_layers_of_a_wide_llama_share_one_program_before_and_after() -> None:
    graph = wide_llama(3)
    operated = ps.apply(graph, "lora_qv")
    for model in (graph, operated):
        programs = model.captures[0].programs
        layers = {programs[f"model.layers.{number}"][0] for number in range(3)}
        assert len(layers) == 1


@pytest.mark.slow
def test_a_70b_llama_is_operated_on_in_less_than_one_and_a_half_gib() -> None:
    row = measured("operate", "measure", "Llama 70B, meta")
    assert row["parameters"] > 68e9
    assert row["sites"] == 160
    assert row["peak"] < 1.5
