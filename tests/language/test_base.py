"""A rule file on another is that one with its own words; whatever is wrong is shown where it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import peftsurgery as ps
from peftsurgery.language.loading import dump_rules, load_rules, page_of, parse_rules
from peftsurgery.language.rule_file import RuleFile, json_schema
from peftsurgery.language.shipped import shipped
from tests.models.captured import captured

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
        ("base: [under.yaml, lroa]", "PSG107", "own.yaml:2:20", "did you mean"),
        ("base: [under.yaml, round.yaml]", "PSG108", "round.yaml:2:7", "stands on"),
        ("base: [under.yaml, own.yaml]", "PSG108", "own.yaml:2:20", "stands on"),
        ("base: [under.yaml, broken.yaml]", "PSG101", "broken.yaml:2:", ""),
        ("base: [under.yaml, odd.yaml]", "PSG106", "odd.yaml:2:8", "rules"),
        ("base: [under.yaml, 3]", "PSG106", "own.yaml:2:20", "text"),
        ("base: [under.yaml, many.yaml]", "PSG108", "many.yaml:", "too many"),
        ("base: []", "PSG106", "own.yaml:2:7", "base"),
        ("base: [lora, ia3]\nchange: [{}, 3]", "PSG106", "own.yaml:3:14", "change"),
        ("base: [lora, ia3]\nchange: [{}, null, null, null, {}]", "PSG109", "own.yaml:3:26", "ia3"),
        ("base: [lora, ia3]\nchange: [{}, {params: {t: {}}}]", "PSG106", "own.yaml:3:27", "shape"),
        ("base: under.yaml\nchange: [null, null]", "PSG106", "own.yaml", "rules"),
        ("base: under.yaml\nchange: [null, {rewrite: z}]", "PSG113", "own.yaml:3:26", "z"),
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
    base.with_name("odd.yaml").write_text("name: odd\nrules: 3\n")
    base.with_name("many.yaml").write_text(
        f"name: many\nbase: [{', '.join(['under.yaml'] * 16)}]\n"
    )
    own = base.with_name("own.yaml")
    own.write_text(f"name: own\n{text}\n")
    with pytest.raises(ps.SurgeryError) as caught:
        load_rules(own)
    error = caught.value
    assert error.code == code, error
    assert where in str(error.where)
    assert words in f"{error.message} {error.hint}"


BESIDE = """
name: beside
about: Beside.
with: {alpha: 16, strength: 1.0}
rules:
  - match: norm
    where: {layers: 1..}
    rewrite: y * strength * alpha
checkpoint: {peft: {peft_type: B}}
"""


def on_two(base: Path, text: str) -> RuleFile:
    """The rules of a file that stands on the base and on another."""
    base.with_name("beside.yaml").write_text(BESIDE)
    own = base.with_name("own.yaml")
    own.write_text(f"name: own\nbase: [{base.name}, beside.yaml]\n{text}\n")
    return load_rules(own)


def test_the_rules_of_several_bases_come_one_after_another(base: Path) -> None:
    made = on_two(base, "with: {strength: 3.0}\nrules: [{match: norm, rewrite: y}]")
    assert [rule.match for rule in made.rules] == ["linear", "norm", "norm", "norm"]
    assert dict(made.with_) == {"rank": 8, "alpha": 16, "roles": ["attn.q"], "strength": 3.0}
    assert list(made.let) == ["scale"]
    assert [path.name for path in made.sources] == ["own.yaml", "under.yaml", "beside.yaml"]


def test_what_is_about_one_base_as_a_whole_is_not_taken_from_several(base: Path) -> None:
    assert on_two(base, "").checkpoint == {}
    assert load_rules("mam_adapter").flat is None
    assert load_rules("prefix_tuning_mlp").flat is not None


def test_a_change_counts_through_the_rules_of_all_bases_and_null_takes_one_out(base: Path) -> None:
    made = on_two(base, "where: {kind: z}\nchange: [null, {rewrite: y}, {where: {layers: null}}]")
    assert [str(rule.rewrite["y"]) for rule in made.rules] == ["y", "y * strength * alpha"]
    assert [rule.where.given() for rule in made.rules] == [{"kind": ("z",)}, {"kind": ("z",)}]


def test_bases_may_stand_on_one_file(base: Path) -> None:
    for name in ("left", "right"):
        base.with_name(f"{name}.yaml").write_text(f"name: {name}\nbase: under.yaml\n")
    own = base.with_name("own.yaml")
    own.write_text("name: own\nbase: [left.yaml, right.yaml]\n")
    assert len(load_rules(own).rules) == 4


@pytest.mark.parametrize(
    ("key", "theirs", "mine", "words"),
    [
        ("with", "with: {alpha: 4}", "with: {alpha: 4}", "16 in a base, and 4"),
        ("with", "with: {alpha: 16.0}", "with: {alpha: 2}", "16 in a base, and 16.0"),
        (
            "let",
            "with: {alpha: 16}\nlet: {scale: alpha}",
            "let: {scale: rank}\nwithout: alpha",
            "alpha / rank",
        ),
        (
            "let",
            "with: {alpha: 16}\nlet: {scale: alpha}",
            "let: {scale: null}\nwithout: alpha\nchange: {rewrite: y, fold: null}",
            "scale",
        ),
        ("roles", "roles: {r: {kind: a}}", "roles: {r: {kind: b}}", "kind"),
    ],
)
def test_names_that_mean_two_things_are_refused_until_the_file_says_which(
    base: Path, key: str, theirs: str, mine: str, words: str
) -> None:
    base.write_text(f"{BASE}\nroles: {{r: {{kind: x}}}}\n")
    other = base.with_name("other.yaml")
    other.write_text(f"name: other\n{theirs}\nrules: [{{match: norm, rewrite: y}}]\n")
    own = base.with_name("own.yaml")
    start = f"name: own\nbase: [{base.name}, other.yaml]\n"
    own.write_text(start)
    with pytest.raises(ps.SurgeryError, match="PSG118") as caught:
        load_rules(own)
    assert "own.yaml:2:20" in str(caught.value.where)
    assert words in caught.value.message
    assert f"`{key}:`" in str(caught.value.hint)
    own.write_text(start + mine)
    assert len(load_rules(own).rules) == 3


def test_rules_that_add_one_parameter_at_one_site_are_refused(base: Path) -> None:
    rules = parse_rules("name: own\nbase: [lora_qv, lora_attention]\nwith: {roles: [attn.q]}")
    with pytest.raises(ps.SurgeryError, match="PSG304") as caught:
        ps.apply(captured("llama"), rules)
    assert "two rules of 'own'" in str(caught.value.hint)


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
