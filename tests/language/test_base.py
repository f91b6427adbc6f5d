"""A rule file on another is that one with its own words; whatever is wrong is shown where it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import peftsurgery as ps
from peftsurgery.language.loading import dump_rules, load_rules, page_of, parse_rules
from peftsurgery.language.rule_file import RuleFile, json_schema
from peftsurgery.language.shipped import shipped

BASE = """
name: under
about: Below.
with: {rank: 8, alpha: 16, roles: [attn.q], unread: 1}
let: {scale: alpha / rank}
rules:
  - match: linear
    where: {role: $roles, kind: x}
    expect: {per_attention: 1}
    params: {A: {shape: [out, in], init: ones}}
    rewrite: y + scale * linear(x, A)
    fold: W + scale * A
    checkpoint: {peft: {A: lora_A}}
  - match: norm
    rewrite: y * rank
checkpoint: {peft: {peft_type: T, r: rank}}
"""


def on(base: Path, text: str) -> RuleFile:
    """The rules of a file that stands on one of the name."""
    own = base.with_name("own.yaml")
    own.write_text(f"name: own\nbase: {base.name}\n{text}", encoding="utf-8")
    return load_rules(own)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "under.yaml"
    path.write_text(BASE, encoding="utf-8")
    return path


def whole(**changes: object) -> RuleFile:
    """The base written out with other values at dotted paths; None takes one out."""
    data = yaml.safe_load(BASE)
    data |= {"name": "own", "about": ""}
    del data["with"]["unread"]
    for path, value in changes.items():
        *owners, last = path.split("__")
        holder = data
        for step in owners:
            holder = holder[int(step) if step.isdecimal() else step]
        if value is None:
            del holder[last]
        else:
            holder[last] = value
    return parse_rules(yaml.safe_dump(data, sort_keys=False))


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("", {}),
        ("about: Mine.", {"about": "Mine."}),
        ("with: {rank: 2}", {"with__rank": 2}),
        ("with: {more: null}", {"with__more": ""}),
        ("let: {scale: alpha}", {"let__scale": "alpha"}),
        ("let: {scale: 1}\nwithout: alpha", {"let__scale": 1, "with__alpha": None}),
        ("change: {expect: 3}", {"rules__0__expect": 3}),
        ("change: [{}, {rewrite: y * 2}]", {"rules__1__rewrite": "y * 2"}),
        ("change: {params: {A: {init: zeros}}}", {"rules__0__params__A__init": "zeros"}),
        (
            "change: {fold: null, checkpoint: null}\ncheckpoint: {peft: {r: null}}",
            {"rules__0__fold": None, "rules__0__checkpoint": None, "checkpoint__peft__r": None},
        ),
    ],
)
def test_what_a_file_says_is_laid_over_its_base(
    base: Path, text: str, changes: dict[str, object]
) -> None:
    expected = whole(**changes)
    if text == "with: {more: null}":  # a setting may be null, which takes nothing out
        expected = expected.model_copy(update={"with_": {**expected.with_, "more": None}})
    assert dump_rules(on(base, text)) == dump_rules(expected)


def test_a_where_is_laid_over_that_of_every_rule_and_further_rules_come_after(base: Path) -> None:
    made = on(base, "where: {layers: 4.., kind: null}\nrules: [{match: norm, rewrite: y}]")
    assert [rule.where.given() for rule in made.rules] == [
        {"role": ("$roles",), "layers": ("4..",)},
        {"layers": ("4..",)},
        {},
    ]


def test_a_setting_that_nothing_reads_any_more_is_none_of_the_file_s(base: Path) -> None:
    assert set(on(base, "").with_) == {"rank", "alpha", "roles"}
    made = on(base, "where: {role: [attn.v]}\nwith: {own: 3}")
    assert set(made.with_) == {"rank", "alpha", "own"}


def test_a_file_may_stand_on_one_that_stands_on_another(base: Path) -> None:
    middle = base.with_name("middle.yaml")
    middle.write_text("name: middle\nbase: under.yaml\nwith: {rank: 2, alpha: 2}\n")
    made = on(middle, "with: {alpha: 4}")
    assert (made.name, made.with_["rank"], made.with_["alpha"]) == ("own", 2, 4)
    assert [path.name for path in made.sources] == ["own.yaml", "middle.yaml", "under.yaml"]


@pytest.mark.parametrize(
    ("text", "code", "where", "words"),
    [
        ("base: lroa", "PSG107", "own.yaml:2:7", "did you mean"),
        ("base: 3", "PSG106", "own.yaml:2:7", "base"),
        ("base: own.yaml", "PSG108", "own.yaml:2:7", "stands on"),
        ("base: round.yaml", "PSG108", "round.yaml:2:7", "stands on"),
        ("base: under.yaml\nchange: [{}, {}, {fold: W}]", "PSG109", "own.yaml:3:18", "2 rules"),
        ("base: under.yaml\nchange: 3", "PSG106", "own.yaml:3:9", "change"),
        ("base: under.yaml\nchange: {wher: {}}", "PSG105", "own.yaml:3:10", "where"),
        ("base: under.yaml\nwhere: {rle: a}", "PSG105", "own.yaml:3:9", "role"),
        ("base: under.yaml\nwhere: {path: 3}", "PSG106", "own.yaml:3:15", "path"),
        ("base: under.yaml\nlet: {scale: rnak}", "PSG113", "own.yaml:3:14", "rank"),
        ("base: under.yaml\nlet: {scale: rank / rank}", "PSG117", "own.yaml:2:7", "alpha"),
        ("base: under.yaml\nwith: {rank: {}}", "PSG106", "own.yaml:3:14", "rank"),
        ("base: under.yaml\nrules: 3", "PSG106", "own.yaml:3:8", "rules"),
        ("base: under.yaml\nchange: {params: null}", "PSG106", "under.yaml:13:", "A"),
        ("base: broken.yaml", "PSG101", "broken.yaml:2:", ""),
        ("bas: under.yaml", "PSG105", "own.yaml:2:1", "base"),
        ("where: {}", "PSG105", "own.yaml:2:1", "where"),
    ],
)
def test_a_mistake_is_shown_where_it_is_written(
    base: Path, text: str, code: str, where: str, words: str
) -> None:
    base.with_name("round.yaml").write_text("name: round\nbase: own.yaml\n")
    base.with_name("broken.yaml").write_text("name: [\n")
    own = base.with_name("own.yaml")
    own.write_text(f"name: own\n{text}\n")
    with pytest.raises(ps.SurgeryError) as caught:
        load_rules(own)
    error = caught.value
    assert error.code == code, error
    assert where in str(error.where)
    assert words in f"{error.message} {error.hint}"


def test_a_page_on_a_base_needs_a_name_of_its_own() -> None:
    with pytest.raises(ps.SurgeryError, match="name"):
        parse_rules("base: lora\n")


@pytest.mark.parametrize("name", shipped())
def test_a_copied_page_stands_by_itself_and_is_the_same_rules(name: str) -> None:
    text = page_of(name)
    assert "base" not in yaml.safe_load(text)
    assert dump_rules(parse_rules(text)) == dump_rules(load_rules(name))


def test_the_json_schema_takes_a_file_on_a_base_and_one_without() -> None:
    schema = json_schema()
    assert {"base", "where", "change"} <= schema["properties"].keys()
    assert schema["required"] == ["name"]
    assert schema["anyOf"] == [{"required": ["rules"]}, {"required": ["base"]}]
