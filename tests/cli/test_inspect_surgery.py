"""What a surgery holds is shown from its own files; why speaks of rules as they were applied."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import peftsurgery as ps
from peftsurgery.surgery import applying

NARROW = """
name: narrow
with: {rank: 4}
rules:
  - match: linear
    where: {role: [attn.q, attn.v], path: 'encoder\\.layer\\.1\\..*'}
    params:
      A: {shape: [rank, in], init: normal(0.1)}
      B: {shape: [out, rank], init: zeros}
    rewrite: y + linear(linear(x, A), B)
    fold: W + B @ A
"""


@pytest.fixture(scope="module")
def surgery(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters of which one is inactive, on a base that is gone."""
    folder = tmp_path_factory.mktemp("held")
    shutil.copytree(bert, folder / "base")
    model = ps.apply(ps.capture(str(folder / "base")), ps.parse_rules(NARROW), "law", rank=3)
    model = ps.apply(model, "ia3", train=["pooler"])
    model = ps.apply(model, "lora_qv", name="spare", rank=2)
    model.deactivate("spare")
    model.save(folder / "surgery")
    shutil.rmtree(folder / "base")
    return folder / "surgery"


def test_what_a_surgery_holds_is_shown_without_its_base(run: Any, surgery: Path) -> None:
    document = run("inspect", surgery, "--json").json
    manifest = json.loads((surgery / "surgery.json").read_text())
    tensors = load_file(surgery / "adapter.safetensors")
    assert document["base"] == manifest["base"]
    assert not Path(document["base"]).exists()
    assert document["fingerprint"]["digest"] == manifest["fingerprint"]["digest"]
    assert document["fingerprint"]["tensors"] == len(manifest["fingerprint"]["tensors"])
    assert document["active"] == ["law", "ia3"]
    law, ia3, spare = document["adapters"]
    assert [each["name"] for each in (law, ia3, spare)] == ["law", "ia3", "spare"]
    assert law["operations"][0]["method"] == "narrow"
    assert law["operations"][0]["settings"] == {"rank": 3}
    for adapter in (law, spare):
        mine = [value for name, value in tensors.items() if f".{adapter['name']}." in name]
        assert adapter["tensors"] == len(mine)
        assert adapter["parameters"] == sum(value.numel() for value in mine)
        assert adapter["bytes"] == sum(value.nbytes for value in mine)
        assert adapter["dtypes"] == ["F32"]
    assert law["parameters"] == 2 * (3 * 32 + 32 * 3)
    trained = {name for name in tensors if "pooler" in name}
    assert set(document["of_the_base"]["names"]) == trained
    assert sum(a["tensors"] for a in document["adapters"]) + len(trained) == len(tensors)
    text = run("inspect", surgery).out
    assert "law: 384 parameters in 4 tensors, 1.5 KiB" in text
    assert "spare (inactive)" in text
    assert "narrow(rank=3)" in text
    assert manifest["fingerprint"]["digest"] in text


def test_a_surgery_is_shown_without_a_capture(
    run: Any, surgery: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a model was opened")

    monkeypatch.setattr(applying, "capture", never)
    monkeypatch.setattr(applying, "open_model", never)
    assert run("inspect", surgery).code == 0


@pytest.mark.parametrize("damage", ["surgery.json", "adapter.safetensors"])
def test_a_damaged_surgery_is_refused(run: Any, surgery: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(surgery, tmp_path / "damaged")
    content = (surgery / damage).read_bytes()
    (tmp_path / "damaged" / damage).write_bytes(content[: len(content) // 2])
    outcome = run("inspect", tmp_path / "damaged", "--json")
    assert outcome.code == 3
    code = "PSG605" if damage == "surgery.json" else "PSG606"
    assert outcome.json["error"]["code"] == code


def test_why_speaks_of_a_rule_as_it_was_applied(run: Any, bert: Path, tmp_path: Path) -> None:
    rule, surgery = tmp_path / "narrow.yaml", tmp_path / "surgery"
    rule.write_text(NARROW)
    assert run("apply", bert, rule, "--name", "law", "-o", surgery).code == 0
    rule.unlink()  # it is in the surgery, as it was applied
    for name in ("law", "narrow"):
        for layer, kept in ((0, False), (1, True)):
            query = f"encoder.layer.{layer}.attention.self.query"
            outcome = run("why", surgery, name, query, "--json")
            assert outcome.code == 0, outcome.out
            assert [each["kept"] for each in outcome.json] == [kept]
            assert [each["rule"] for each in outcome.json] == ["law"]
    # another rule is meant as it would be applied
    query = "encoder.layer.0.attention.self.query"
    assert run("why", surgery, "lora_qv", query, "--json").json[0]["kept"] is True
    assert run("why", surgery, "law", query, "--set", "rnk=3", "--json").json["error"]["code"]


def test_a_rule_over_others_is_explained_among_them(run: Any, bert: Path, tmp_path: Path) -> None:
    two = ps.apply(ps.apply(ps.capture(str(bert)), "pfeiffer", "a"), "pfeiffer", "b")
    fused = ps.apply(two, "adapter_fusion", name="f", adapters=["a", "b"])
    fused.save(tmp_path / "surgery")
    path = next(match["module"] for match in fused.report.matches if match["adapter"] == "f")
    outcome = run("why", tmp_path / "surgery", "adapter_fusion", path, "--json")
    assert outcome.code == 0, outcome.out
    assert [each["kept"] for each in outcome.json] == [True]
