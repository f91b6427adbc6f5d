"""What a surgery holds is shown from its own files; why speaks of rules as they were applied."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import peftsurgery as ps
from peftsurgery.surgery import loading

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
    trained = {name for name in tensors if "pooler" in name}
    for adapter in (law, ia3, spare):
        mine = [value for name, value in tensors.items() if f".{adapter['name']}." in name]
        mine += [tensors[name] for name in trained if adapter is ia3]
        assert adapter["tensors"] == len(mine)
        assert adapter["parameters"] == sum(value.numel() for value in mine)
        assert adapter["bytes"] == sum(value.nbytes for value in mine)
        assert adapter["dtypes"] == ["F32"]
    assert law["parameters"] == 2 * (3 * 32 + 32 * 3)
    assert set(ia3["trained"]) == trained
    assert document["of_the_base"]["names"] == []
    assert sum(adapter["tensors"] for adapter in document["adapters"]) == len(tensors)
    assert [each["seed"] for each in ia3["operations"]] == 2 * [law["operations"][0]["seed"]]
    text = run("inspect", surgery).out
    assert "  trains of the base: pooler.dense.bias and 1 more" in text
    assert "law: 384 parameters in 4 tensors, 1.5 KiB" in text
    assert "spare (inactive)" in text
    assert "narrow(rank=3)" in text
    assert manifest["fingerprint"]["digest"] in text


def test_what_trains_the_base_owns_what_it_trained_whatever_it_is_called(
    run: Any, bert: Path, tmp_path: Path
) -> None:
    """And what a surgery does not say is told by the names of its tensors."""
    graph = ps.capture(str(bert))
    bias = ps.Rule(match="parameter", where={"kind": "bias", "path": ".*query.*"}, train=True)
    norm = ps.Rule(match="parameter", where={"path": ".*LayerNorm.*"}, train=True)
    model = ps.apply(ps.apply(graph, bias, name="layer"), norm, name="attention")
    model.deactivate()  # two active adapters may not train one parameter
    model = ps.apply(model, bias, name="again")
    model.save(tmp_path / "all")
    tensors = load_file(tmp_path / "all/adapter.safetensors")
    held = {a["name"]: a for a in run("inspect", tmp_path / "all", "--json").json["adapters"]}
    for name in model.adapters:
        assert held[name]["parameters"] == sum(v.numel() for v in model.learnt(name).values()) > 0
        assert set(held[name]["trained"]) == model.learnt(name).keys()
    assert sum(each["tensors"] for each in held.values()) == len(tensors)
    file = tmp_path / "all/surgery.json"
    said = json.loads(file.read_text())
    assert "lost" not in said["operations"][0]
    file.write_text(json.dumps({key: value for key, value in said.items() if key != "trained"}))
    older = run("inspect", tmp_path / "all", "--json")
    assert older.code == 0
    assert [each["trained"] for each in older.json["adapters"]] == [[], [], []]
    file.write_text(json.dumps(said | {"trained": {"x": "nobody"}}))
    assert run("inspect", tmp_path / "all", "--json").json["error"]["code"] == "PSG605"


def test_a_surgery_is_shown_without_a_capture(
    run: Any, surgery: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a model was opened")

    monkeypatch.setattr(loading, "capture", never)
    monkeypatch.setattr(loading, "open_model", never)
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


@pytest.mark.slow
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
