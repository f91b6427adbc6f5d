"""The commands that open a model: doctor, inspect, why."""

from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.mark.slow
def test_doctor_tells_versions_and_that_a_capture_works(run: Any) -> None:
    report = run("doctor", "--json").json
    assert report["packages"]["torch"] == torch.__version__
    assert report["capture_seconds"] > 0
    lines = [line.split() for line in run("doctor").out.splitlines()]
    assert ["torch", torch.__version__] in lines


def test_inspect_shows_equal_blocks_once_with_their_roles(run: Any, bert: Path) -> None:
    outcome = run("inspect", bert)
    assert outcome.code == 0, outcome.err
    assert "encoder.layer.0 … encoder.layer.1  BertLayer, 2 equal blocks" in outcome.out
    query = [line for line in outcome.out.splitlines() if "self.query" in line]
    assert len(query) == 1
    assert "attn.q" in query[0]
    assert "roles of encoder.layer.0 … 1: attn.q 1, attn.k 1, attn.v 1, attn.o 1" in outcome.out


def test_inspect_json_lists_every_site_of_every_block(run: Any, bert: Path) -> None:
    document = run("inspect", bert, "--json").json
    queries = [site["module"] for site in document["sites"] if site["role"] == "attn.q"]
    assert queries == [f"encoder.layer.{n}.attention.self.query" for n in range(2)]
    assert [block["path"] for block in document["blocks"]] == [f"encoder.layer.{n}" for n in (0, 1)]


def test_why_names_the_clause_that_dropped_a_site(run: Any, bert: Path) -> None:
    key = "encoder.layer.0.attention.self.key"
    outcome = run("why", bert, "lora_qv", key, "--json")
    assert outcome.code == 0, outcome.out
    assert outcome.json[0]["kept"] is False
    assert "role is attn.k, not one of attn.q, attn.v" in outcome.json[0]["why"]
    query = run("why", bert, "lora_qv", key.replace("key", "query"), "--json").json
    assert query[0]["kept"] is True


def test_why_suggests_the_nearest_site(run: Any, bert: Path) -> None:
    outcome = run("why", bert, "lora_qv", "encoder.layer.0.attention.self.qery")
    assert outcome.code == 1
    assert "encoder.layer.0.attention.self.query" in outcome.err
