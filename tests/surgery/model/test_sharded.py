"""Two processes compute what one does: DDP, FSDP2 and what is saved of a sharded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftsurgery.surgery.model.saved.manifest import MANIFEST
from tests.surgery.model.processes import together

# Two processes that import and capture take half a minute: they are started once for all tests.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("sharded")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What both processes found."""
    return together(Path(__file__).with_name("sharded_script.py"), folder)


def test_losses_and_gradients_are_those_of_one_process(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert {
            name: value for name, value in each.items() if isinstance(value, float) and value > 2e-6
        } == {}


def test_a_budget_leaves_the_ranks_that_it_leaves_in_one_process(
    found: list[dict[str, Any]],
) -> None:
    assert found[0]["ranks"] == found[1]["ranks"]
    assert found[0]["ranks"][0] == found[0]["ranks"][1]


def test_a_sharded_model_is_saved_byte_for_byte(found: list[dict[str, Any]], folder: Path) -> None:
    expected, saved = (folder / name for name in ("alone-0", "sharded"))
    for file in sorted(expected.rglob("*")):
        if file.is_file() and file.name != MANIFEST:
            assert (saved / file.relative_to(expected)).read_bytes() == file.read_bytes()
    mine, theirs = (json.loads((f / MANIFEST).read_text()) for f in (saved, expected))
    assert {**mine, "date": ""} == {**theirs, "date": ""}
    assert found[0]["seen after save"] == found[1]["seen after save"]  # both waited for the first


def test_what_a_sharded_model_cannot_do_is_refused_in_every_process(
    found: list[dict[str, Any]],
) -> None:
    assert found[0]["codes"] == ["PSG604", *["PSG225"] * 6, "PSG355"]
    assert found[1]["codes"] == found[0]["codes"]
