"""Roles and attention facts of every model of the zoo agree with the table written by hand."""

from __future__ import annotations

import pytest
import torch

import peftsurgery as ps
from peftsurgery.anatomy import Placed, survey
from tests.anatomy.tables import EXPECTED, Core, Part
from tests.models.captured import captured
from tests.models.zoo import hf

Found = tuple[str, str, tuple[int, ...] | None]
WEIGHTS = ("linear", "experts", "embedding")


def surveyed(name: str) -> tuple[Placed, ...]:
    return survey(captured(name).captures[0])


def numbered(name: str) -> list[str]:
    return [name.replace("#", layer) for layer in "01"] if "#" in name else [name]


def expected_roles(name: str) -> set[Found]:
    found: set[Found] = set()
    for role, entries in EXPECTED[name].roles.items():
        for entry in entries:
            rows = entry.rows() if isinstance(entry, Part) else None
            module = entry.module if isinstance(entry, Part) else entry
            found |= {(role, path, rows) for path in numbered(module)}
    return found


def as_found(site: Placed) -> Found:
    rows = None if site.slice is None else tuple(site.slice.indices())
    return site.role or "", str(site.parameter).removesuffix(".weight"), rows


@pytest.mark.parametrize("name", EXPECTED)
def test_every_weight_has_the_role_the_modeling_code_gives_it(name: str) -> None:
    found = {as_found(site) for site in surveyed(name) if site.kind in WEIGHTS}
    expected = expected_roles(name)
    assert sorted(found - expected, key=str) == []
    assert sorted(expected - found, key=str) == []


@pytest.mark.parametrize("name", EXPECTED)
def test_attention_has_the_facts_of_the_config(name: str) -> None:
    found = {
        site.module: Core(**{f: site.facts[f] for f in Core.__dataclass_fields__})
        for site in surveyed(name)
        if site.kind == "attention"
    }
    expected = {
        path: core for module, core in EXPECTED[name].cores.items() for path in numbered(module)
    }
    assert found == expected


@pytest.mark.parametrize("name", EXPECTED)
def test_the_parts_of_a_core_name_it(name: str) -> None:
    sites = surveyed(name)
    cores = {site.attentions for site in sites if site.kind == "attention"}
    parts = [site for site in sites if (site.role or "").startswith("attn.")]
    assert {site.attentions for site in parts} == cores
    for core in cores:
        roles = {site.role for site in parts if site.attentions == core}
        assert {"attn.q", "attn.k", "attn.v", "attn.o"} <= roles


def test_layers_are_counted_in_the_list_the_module_is_in() -> None:
    sites = [site for site in surveyed("t5") if site.kind == "linear"]
    found = {site.module: site.layer for site in sites}
    assert found["decoder.block.1.layer.2.DenseReluDense.wo"] == 1
    assert found["lm_head"] is None
    classifier = [site for site in surveyed("resnet") if site.role == "head"]
    assert {(site.kind, site.layer) for site in classifier} == {
        ("linear", None),
        ("parameter", None),  # its weight and its bias have its role
    }


def test_equal_blocks_share_their_sites() -> None:
    queries = [site for site in surveyed("llama") if site.role == "attn.q"]
    assert len(queries) == 2
    assert queries[0].site is queries[1].site
    assert queries[0].type == "Linear"


def test_a_decoder_with_a_vocabulary_of_its_own_has_a_table_of_tokens() -> None:
    make = hf(
        "MarianMTModel",
        "MarianConfig",
        vocab_size=99,
        decoder_vocab_size=61,
        share_encoder_decoder_embeddings=False,
        tie_word_embeddings=False,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    ids = torch.arange(14).view(2, 7)
    graph = ps.capture(make(), inputs={"input_ids": ids, "decoder_input_ids": ids[:, 1:]})
    tables = [site for site in survey(graph.base_capture) if site.kind == "embedding"]
    assert {site.module: site.role for site in tables} == {
        f"model.{part}.{table}": f"embed.{table.removeprefix('embed_')}"
        for part in ("encoder", "decoder")
        for table in ("embed_tokens", "embed_positions")
    }
