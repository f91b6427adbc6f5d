"""inspect --html: where it writes, what it refuses, and what it says of rules."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peftsurgery as ps


def data_of(page: Path) -> dict[str, Any]:
    """The data in a page."""
    text = page.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_a_page_has_the_sites_of_the_model_and_what_a_rule_would_match(
    run: Any, bert: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    outcome = run("inspect", bert, "--html", page, "--rule", "lora_qv", "--rule", "bitfit")
    assert (outcome.code, outcome.out) == (0, ""), outcome.err
    data = data_of(page)
    assert data["schema"] == "peftsurgery.page/1"
    graph = ps.capture(str(bert))
    sites = [site for site in ps.sites(graph) if site.kind != "parameter"]
    assert len(data["sites"]) == len(sites)
    roles = {f"{site.module} {site.role}" for site in sites if site.role}
    assert {f"{s['name'].split(' ')[0]} {s['role']}" for s in data["sites"] if "role" in s} == roles
    matched = {e["module"] for e in data["insertions"] if e["adapter"].startswith("lora_qv")}
    report = ps.apply(graph, "lora_qv").report
    assert matched == {match["module"] for match in report.to_dict()["matches"]}
    assert all(entry["would"] for entry in data["insertions"])
    assert run("inspect", bert, "--html", page).code == 3
    assert run("inspect", bert, "--html", page, "--force").code == 0
    assert data_of(page)["insertions"] == []


def test_what_makes_no_sense_is_refused_before_the_model_is_read(run: Any, tmp_path: Path) -> None:
    missing = tmp_path / "there_is_no_model"
    assert run("inspect", missing, "--rule", "lora_qv").code == 2
    misspelt = run("inspect", missing, "--html", tmp_path / "page.html", "--rule", "lora_q")
    assert misspelt.code == 3
    assert "lora_qv" in misspelt.err
    assert not (tmp_path / "page.html").exists()
