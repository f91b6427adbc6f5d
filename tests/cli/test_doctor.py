"""Versions that were tested, versions that are here, and what doctor says of them."""

from __future__ import annotations

from email.message import Message
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from peftsurgery.cli import doctor

NEEDS = [
    "torch<2.14,>=2.13",
    "transformers<5.25,>=5.23",
    "click>=8.1",
    'peft>=0.21; extra == "peft"',
    'ruff>=0.12; extra == "dev"',
]


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Pretend that these are the versions here; what is not named is missing."""

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    about = Message()
    for extra in ("peft", "dev"):
        about["Provides-Extra"] = extra
    monkeypatch.setattr(metadata, "requires", lambda name: NEEDS)
    monkeypatch.setattr(metadata, "metadata", lambda name: about)
    monkeypatch.setattr(metadata, "version", version)


HERE = {"torch": "2.13.0+cpu", "transformers": "5.24.0", "click": "8.5.1", "peft": "0.21.2"}


@pytest.mark.parametrize(
    ("changed", "states"),
    [
        ({}, {"torch": "ok", "transformers": "ok", "click": "ok", "peft": "ok"}),
        ({"transformers": "5.25.0"}, {"transformers": "newer"}),
        ({"transformers": "6.0.0rc1"}, {"transformers": "newer"}),
        ({"torch": "2.14.0.dev20261101+cu130"}, {"torch": "newer"}),
        ({"torch": "2.12.1"}, {"torch": "older"}),
        ({"click": "99.0"}, {"click": "ok"}),
        ({"peft": "0.20.0"}, {"peft": "older"}),
    ],
)
def test_a_version_outside_of_what_was_tested_is_told_apart(
    changed: dict[str, str], states: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, **{**HERE, **changed})
    found = {package.name: package.state for package in doctor.packages_needed()}
    assert set(found) == set(HERE)  # nothing of what developers need
    assert {name: found[name] for name in states} == states


def test_a_newer_transformers_is_said_with_what_was_tested(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, **{**HERE, "transformers": "5.99.0"})
    monkeypatch.setattr(doctor, "_trial", lambda: {"capture_seconds": 0.1})
    outcome = run("doctor")
    assert "5.99.0  NEWER than what was tested (<5.25,>=5.23)" in outcome.out
    assert outcome.code == 0
    (untested,) = run("doctor", "--json").json["untested"]
    assert (untested["name"], untested["state"]) == ("transformers", "newer")


def test_without_torch_the_versions_are_shown_all_the_same(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, click="8.5.1", transformers="5.24.0")
    outcome = run("doctor")
    assert outcome.code == 3
    lines = [line.split() for line in outcome.out.splitlines()]
    assert ["torch", "MISSING"] in lines
    assert ["transformers", "5.24.0"] in lines
    assert "missing peft: pip install 'peftsurgery[peft]'" in outcome.out


@pytest.mark.parametrize("compiled", [True, False])
def test_folds_that_are_slower_than_need_be_are_told(
    run: Any, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    monkeypatch.setattr(doctor, "_trial", lambda: {"capture_seconds": 0.1, "compiled": compiled})
    assert ("there was no C compiler" in run("doctor").out) is not compiled
    assert run("doctor", "--json").json["machine"]["compiled"] is compiled


def test_a_trial_that_fails_hides_no_version(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, **{**HERE, "transformers": "7.0.0"})
    monkeypatch.setattr(
        doctor, "_trial", lambda: {"capture_error": "cannot import name 'exporters'"}
    )
    outcome = run("doctor")
    assert outcome.code == 3
    assert "7.0.0  NEWER" in outcome.out
    assert "a trial capture failed: cannot import name 'exporters'" in outcome.out


def test_a_library_that_ends_its_process_is_an_error_like_others(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("import os; os.abort()")
    monkeypatch.syspath_prepend(tmp_path)
    outcome = run("doctor", "--json")
    assert outcome.code == 3
    assert "-6" in outcome.json["capture_error"]
    assert outcome.json["packages"]["torch"]
