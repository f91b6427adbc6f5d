"""Rule files as a whole: every mistake is refused with its code, at its line and column."""

import os
import time

import pytest
import yaml

from peftsurgery.errors import SurgeryError
from peftsurgery.language.loading import load_rules, parse_rules
from peftsurgery.language.rule_file import json_schema
from peftsurgery.language.shipped import shipped

HEAD = "name: t\nwith: {rank: 8, alpha: 16}\nrules:\n  - match: linear\n    rewrite: y\n"


def refusal(text):
    with pytest.raises(SurgeryError) as caught:
        parse_rules(text, "t.yaml")
    return caught.value


MISTAKES = {
    "    wher: {}": ("PSG105", "t.yaml:6:5", "where"),
    "    where: {rle: attn.q}": ("PSG105", "t.yaml:6:13", "role"),
    "    where: {not: {rle: attn.q}}": ("PSG105", "t.yaml:6:19", "role"),
    "    where: {layers: four}": ("PSG106", "t.yaml:6:21", "4.."),
    "    where: {path: 3}": ("PSG106", "t.yaml:6:19", ""),
    "    where: 3": ("PSG106", "t.yaml:6:12", ""),
    "    where: {layers: $rnk}": ("PSG120", None, "rank"),
    "    expect: many": ("PSG106", "t.yaml:6:13", ""),
    "    expect: -1": ("PSG106", "t.yaml:6:13", ""),
    "    expect: {per_attn: 1}": ("PSG105", "t.yaml:6:14", "per_attention"),
    "    train: yes": ("PSG106", "t.yaml:6:12", ""),
    "    params: {A: {shape: [rnk, in]}}": ("PSG113", "t.yaml:6:26", "rank"),
    "    params: {A: {shape: [x]}}": ("PSG113", "t.yaml:6:26", ""),
    "    params: {A: {shape: [1], init: zeroes}}": ("PSG113", "t.yaml:6:36", "zeros"),
    "    params: {A: {shape: [1], init: y}}": ("PSG113", "t.yaml:6:36", ""),
    "    params: {A: {init: zeros}}": ("PSG106", "t.yaml:6:17", ""),
    "    params: {A: {shape: [1], dtype: int8}}": ("PSG106", "t.yaml:6:37", ""),
    "    params: {W: {shape: [1]}}": ("PSG106", "t.yaml:6:14", "another"),
    "    params: {rank: {shape: [1]}}": ("PSG106", "t.yaml:6:14", "another"),
    "    params: {a-b: {shape: [1]}}": ("PSG106", "t.yaml:6:14", ""),
    "    let: {s: 'liner(x, W)'}": ("PSG114", "t.yaml:6:15", "linear"),
    "    let: {s: linear(x, W)}": ("PSG110", "t.yaml:6:", "quote"),
    "    let: {s: x.T}": ("PSG111", "t.yaml:6:14", ""),
    "    let: {s: 2 ** 999}": ("PSG112", "t.yaml:6:14", ""),
    "    fold: W + x": ("PSG113", "t.yaml:6:15", ""),
    "    fold: {Q: W}": ("PSG106", "t.yaml:6:12", ""),
    "    checkpoint: {peft: {C: lora_C}}": ("PSG106", "t.yaml:6:25", ""),
    "    match: linear": ("PSG103", "t.yaml:6:5", "line 4"),
    "  - match: liner": ("PSG106", "t.yaml:6:12", "linear"),
    "  - match: linear": ("PSG106", "t.yaml:6:12", "rewrite"),
    "  - match: attention\n    fold: o\n    rewrite: o": ("PSG106", "t.yaml:7:11", ""),
    "  - match: {pattern: '-view_as(x, z)'}\n    rewrite: y": ("PSG144", "t.yaml:6:23", ""),
    "roles: 3": ("PSG106", "t.yaml:6:8", ""),
    "nme: 3": ("PSG105", "t.yaml:6:1", "name"),
    "let: {s: alpha / rnk}": ("PSG113", "t.yaml:6:18", "rank"),
    "let: {rank: 3}": ("PSG106", "t.yaml:6:7", "another"),
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_refused_at_its_place_with_the_nearest_right_word(line):
    code, where, hint = MISTAKES[line]
    error = refusal(HEAD + line + "\n")
    assert error.code == code
    assert where is None or error.where.startswith(where)
    assert hint in (error.hint or "")


def test_a_file_needs_a_name_and_rules():
    assert refusal("name: t\n").code == "PSG106"
    assert refusal("name: t\nrules: []\n").code == "PSG106"
    assert refusal("name: Not A Name\nrules: [{match: linear, rewrite: y}]\n").code == "PSG106"
    assert "name" in refusal("rules: [{match: linear, rewrite: y}]\n").message


def test_a_let_about_activations_can_be_used_in_rewrite_but_not_in_fold():
    good = HEAD + "    let: {d: W * 2, e: x * 2}\n    fold: d\n"
    assert parse_rules(good).rules[0].fold.keys() == {"W"}
    assert refusal(good.replace("fold: d", "fold: e")).code == "PSG113"


def test_short_and_long_forms_of_rewrite_and_fold_are_one():
    short = parse_rules(HEAD + "    fold: W\n").rules[0]
    long = parse_rules(HEAD.replace("rewrite: y", "rewrite: {y: y}") + "    fold: {W: W}\n")
    assert short == long.rules[0]


def test_each_kind_rewrites_its_own_result():
    kinds = {"attention": "o", "residual": "h", "embedding": "y", "norm": "y", "conv": "y"}
    for kind, result in kinds.items():
        text = f"name: t\nrules: [{{match: {kind}, rewrite: {result} * 2}}]\n"
        assert parse_rules(text).rules[0].rewrite.keys() == {result}


def test_shipped_rules_load_by_name_and_by_path_alike():
    for name, path in shipped().items():
        assert load_rules(name) == load_rules(path)
        assert load_rules(name).name == name
        assert "arXiv" in load_rules(name).about


def test_a_name_that_is_not_shipped_is_refused_with_the_nearest():
    with pytest.raises(SurgeryError) as caught:
        load_rules("lora_vq")
    assert caught.value.code == "PSG107"
    assert "lora_qv" in caught.value.hint


def test_a_directory_or_a_fifo_is_not_a_rule_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    start = time.perf_counter()
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "absent.yaml", "x" * 5000, "a\0b"):
        with pytest.raises(SurgeryError) as caught:
            load_rules(path)
        assert caught.value.code == "PSG107"
    assert time.perf_counter() - start < 2


def test_the_json_schema_names_every_key_of_the_shipped_rules():
    schema = json_schema()
    keys = set(schema["properties"])
    rule_keys = set(schema["$defs"]["Rule"]["properties"])
    for path in shipped().values():
        data = yaml.safe_load(path.read_text())
        assert set(data) <= keys
        assert all(set(rule) <= rule_keys for rule in data.get("rules", ()))
    assert schema["additionalProperties"] is False
    assert schema["properties"]["with"]["description"]
