"""rules ls, show, cp, check, schema; and explain."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from peftsurgery.codes import CODES
from peftsurgery.language.loading import dump_rules, load_rules

SHIPPED = Path(__file__).resolve().parents[2] / "rules"
NAMES = sorted(path.stem for path in SHIPPED.glob("*.yaml"))

WRONG_FOLD = """
name: wrong
rules:
  - match: linear
    params: {A: {shape: [2, in]}, B: {shape: [out, 2]}}
    rewrite: y + linear(linear(x, A), B)
    fold: W + 2 * (B @ A)
"""


def test_ls_lists_every_shipped_rule_with_what_it_is(run: Any) -> None:
    outcome = run("rules", "ls")
    assert [line.split()[0] for line in outcome.out.splitlines()] == NAMES
    assert all(len(line.split()) > 3 for line in outcome.out.splitlines())
    assert [row["name"] for row in run("rules", "ls", "--json").json] == NAMES


def test_show_describes_a_rule_and_yaml_prints_the_file(run: Any) -> None:
    assert "role attn.q or attn.v" in run("rules", "show", "lora_qv").out
    printed = run("rules", "show", "lora", "--yaml").out
    assert printed.rstrip() == (SHIPPED / "lora.yaml").read_text().rstrip()
    assert "rewrite" in run("rules", "show", "lora_qv", "--yaml").out, "a file on another is whole"
    assert yaml.safe_load(run("rules", "show", "lora_qv", "--json").json["text"])


def test_words_lists_what_a_rule_may_say(run: Any) -> None:
    listed = run("rules", "words", "--json").json
    assert listed["sites"]["linear"]["weights"] == ["W", "b"]
    assert "extend(mask, length)" in " ".join(listed["sites"]["attention"]["functions"])
    assert listed["operators"]["linear(x, W, b=None)"]
    assert all(listed["operators"].values()), "every operator says what it is"
    printed = run("rules", "words").out
    assert all(usage in printed for usage in listed["operators"])


def test_cp_copies_a_rule_and_does_not_overwrite(run: Any, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    assert run("rules", "cp", "lora", mine).code == 0
    assert mine.read_bytes() == (SHIPPED / "lora.yaml").read_bytes()
    assert run("rules", "cp", "dora", mine).code == 3
    assert mine.read_bytes() == (SHIPPED / "lora.yaml").read_bytes()
    assert run("rules", "cp", "dora", tmp_path).code == 0
    assert dump_rules(load_rules(tmp_path / "dora.yaml")) == dump_rules(load_rules("dora"))


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_rule_passes_its_check(run: Any, name: str) -> None:
    outcome = run("rules", "check", name, "--json")
    assert outcome.code == 0, outcome.out
    rewrites = any(rule.rewrite for rule in load_rules(name).rules)
    assert bool(outcome.json[0]["checks"]) == rewrites, "what rewrites nothing has nothing to prove"


def test_check_refuses_a_fold_that_is_not_the_rewrite(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(WRONG_FOLD)
    outcome = run("rules", "check", path, "--json")
    assert outcome.json["error"]["code"] == "PSG130"
    assert outcome.code == CODES["PSG130"].exit_code


def test_schema_knows_the_keys_of_every_shipped_rule(run: Any) -> None:
    schema = run("rules", "schema").json
    used = {key for name in NAMES for key in yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())}
    assert used <= set(schema["properties"])


def test_explain_prints_an_entry_of_the_catalogue(run: Any) -> None:
    outcome = run("explain", "psg301")
    assert CODES["PSG301"].title in outcome.out
    assert CODES["PSG301"].explanation in outcome.out
    assert run("explain", "PSG301", "--json").json["exit_code"] == 1


def test_explain_without_a_code_lists_all(run: Any) -> None:
    assert [line.split()[0] for line in run("explain").out.splitlines()] == sorted(CODES)
    assert len(run("explain", "--json").json) == len(CODES)


def test_ls_fits_a_terminal_and_is_whole_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    from peftsurgery.cli import rules

    line = "a rule with a long text " * 10
    assert rules._fitted(line) == line
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert len(rules._fitted(line)) <= 40
    assert rules._fitted("short") == "short"


def test_check_takes_the_sizes_of_sites(run: Any, tmp_path: Path) -> None:
    rule = tmp_path / "r.yaml"
    rule.write_text(
        "name: r\nrules: [{match: linear, params: {s: {shape: [in // 32]}}, rewrite: "
        "{x: 'x * reshape(s[:, None] * ones_like(reshape(W[0], [in // 32, 32])), [in])'}}]\n"
    )
    assert "in 64, out 96" in run("rules", "check", rule).out
    assert "in 128, out 3" in run("rules", "check", rule, "--size", "in=128", "--size", "out=3").out
    assert (
        run("rules", "check", rule, "--size", "in=18", "--json").json["error"]["code"] == "PSG122"
    )
    assert run("rules", "check", rule, "--size", "inn=18").code == 2
