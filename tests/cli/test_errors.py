"""Whatever goes wrong ends in a coded error on the right stream and the right exit code."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from peftsurgery.cli.kit import clean, translate
from peftsurgery.codes import CODES
from peftsurgery.errors import SurgeryError
from peftsurgery.files import why_unread


def raising(error: BaseException) -> Callable[[], Any]:
    def run() -> None:
        raise error

    return run


def refused(code: str) -> SurgeryError:
    return SurgeryError(code, "a message", hint="a hint")


@pytest.mark.parametrize("code", sorted(CODES))
def test_every_code_has_an_exit_code_of_the_contract_and_an_explanation(code: str) -> None:
    assert CODES[code].exit_code in (1, 2, 3, 4)
    assert CODES[code].title
    assert len(CODES[code].explanation) > 20


@pytest.mark.parametrize("code", sorted(CODES))
def test_an_error_ends_with_the_exit_code_of_its_code(
    code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert translate(raising(refused(code)), as_json=False) == CODES[code].exit_code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {code}: a message")


def test_with_json_an_error_is_one_document_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert translate(raising(refused("PSG301")), as_json=True) == 1
    captured = capsys.readouterr()
    assert captured.err == ""
    error = json.loads(captured.out)["error"]
    assert (error["code"], error["message"], error["hint"]) == ("PSG301", "a message", "a hint")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), click.Abort()])
def test_an_interruption_ends_with_130(interruption: BaseException) -> None:
    assert translate(raising(interruption), as_json=False) == 130


def test_an_error_of_the_system_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing"
    assert translate(missing.read_text, as_json=False) == 3
    assert f"PSG603: {missing}: No such file" in capsys.readouterr().err


def test_a_missing_optional_package_is_an_error_that_names_the_extra(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime.capi")
    assert translate(raising(error), as_json=False) == 3
    assert "pip install 'peftsurgery[onnx]'" in capsys.readouterr().err


def test_a_missing_package_that_is_nobodys_extra_is_a_defect_and_is_not_hidden() -> None:
    with pytest.raises(ModuleNotFoundError):
        translate(raising(ModuleNotFoundError("No module named 'x'", name="x")), as_json=False)


def test_control_characters_of_a_name_do_not_reach_the_terminal() -> None:
    assert clean("a\x1b[2Jb\r\x00\nc ü") == "a\\x1b[2Jb\\r\\x00\nc ü"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["aply"], "did you mean 'peftsurgery apply'?"),
        (["rules", "lss"], "did you mean 'peftsurgery rules ls'?"),
        (["explain", "--jsn"], "--json"),
        (["apply", "model", "lora_qv", "--dry-runn"], "--dry-run"),
        (["apply", "model", "lora_qv"], "--output OUT or --dry-run"),
        (["apply", "model", "lora_qv", "-o", "x", "--dry-run"], "--output OUT or --dry-run"),
        (["apply", "m", "lora_qv", "dora", "--name", "n", "--dry-run"], "--name is for one RULE"),
        (["fold", "surgery"], "'--output'"),
    ],
)
def test_a_wrong_command_line_is_usage_and_names_the_right_one(
    run: Any, arguments: list[str], words: str
) -> None:
    outcome = run(*arguments)
    assert outcome.code == 2
    assert words in outcome.err
    assert outcome.out == ""


def test_a_wrong_command_line_with_json_is_json(run: Any) -> None:
    outcome = run("apply", "--json")
    assert outcome.code == 2
    assert outcome.json["error"]["code"] == "PSG901"
    assert "MODEL" in outcome.json["error"]["message"]


def test_without_arguments_the_help_is_printed(run: Any) -> None:
    outcome = run()
    assert outcome.code == 2
    assert "Commands:" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "code", "exit_code"),
    [
        (["apply", "model", "lora_qw", "--dry-run"], "PSG107", 3),
        (["rules", "check", "lora_qv", "--set", "rnk=4"], "PSG120", 3),
        (["apply", "model", "lora_qv", "--set", "rank", "--dry-run"], "PSG121", 3),
        (["apply", "no-such-model", "lora_qv", "--dry-run"], "PSG205", 3),
        (["inspect", "no_such_module:factory"], "PSG205", 3),
        (["why", "no-such-model", "lora_qw", "x"], "PSG107", 3),
        (["rules", "show", "lora_qw"], "PSG107", 3),
        (["rules", "check", "lora_qw"], "PSG107", 3),
        (["explain", "PSG30"], "PSG903", 3),
    ],
)
def test_bad_input_is_coded(run: Any, arguments: list[str], code: str, exit_code: int) -> None:
    outcome = run(*arguments, "--json")
    assert outcome.json["error"]["code"] == code
    assert outcome.code == exit_code


@pytest.mark.parametrize(
    "arguments",
    [
        ["explain", "--json"],
        ["rules", "show", "lora_qv"],
        ["explain", "PSG30", "--json"],
        ["--help"],
    ],
)
def test_a_reader_that_goes_away_is_not_complained_about(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "peftsurgery", *arguments]
    reading, writing = os.pipe()
    with subprocess.Popen(command, stdout=writing, stderr=subprocess.PIPE, text=True) as process:
        os.close(writing)
        os.close(reading)
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 141  # as of a program that SIGPIPE ended


def test_a_real_interruption_ends_with_130_and_no_traceback() -> None:
    script = (
        "import os, signal\n"
        # a shell that starts a run in the background has it ignore interruptions
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from peftsurgery.cli.root import root\n"
        "@root.command()\n"
        "def wait(): os.kill(os.getpid(), signal.SIGINT)\n"
        "root.main(['wait'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--set", "rnk=3"], "PSG120"),
        (["--set", "rank=0"], "PSG122"),
        (["--set", "rank=x"], "PSG121"),
        (["--set", "rank=3", "--set", "rank=4"], "PSG121"),
        (["--set", "name=x"], "PSG120"),
        (["--set", "model=x"], "PSG120"),
        (["--set", "train=q_proj"], "PSG120"),
    ],
)
def test_settings_are_refused_before_the_model_is_opened(run, tmp_path, words, code):
    for command in (["apply", "no/model", "lora_qv", "-o", tmp_path / "out"], ["why"]):
        line = command if len(command) > 1 else ["why", "no/model", "lora_qv", "a.b"]
        outcome = run(*line, *words, "--json")
        assert outcome.json["error"]["code"] == code  # not that there is no such model
        assert outcome.code == 3


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("./nothere", "holds no model's directory"),
        ("nowhere/at/all", "there is no directory 'nowhere/at'"),
        ("some/config.json", "give the directory itself: 'some'"),
        ("models", "it holds some"),
        ("models/sone", "did you mean 'some'?"),
    ],
)
def test_a_wrong_path_of_a_model_comes_with_what_is_near(
    run: Any, spec: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("some", "models/some"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "models" / "some" if spec == "./nothere" else tmp_path)
    outcome = run("inspect", spec, "--json")
    assert (outcome.code, outcome.json["error"]["code"]) == (3, "PSG205")
    assert hint in outcome.json["error"]["hint"]


def test_a_hub_id_without_an_owner_is_asked_for_as_one() -> None:
    from peftsurgery.places import is_hub_id

    assert all(map(is_hub_id, ["gpt2", "bert-base-uncased", "owner/name", "a.b/c_d-1"]))
    assert not any(map(is_hub_id, ["./gpt2", "../a", "/a", "a/b/c", "a//b", "", "a/./b", "~/a"]))


def test_a_rule_and_a_code_that_are_not_there_end_alike(run: Any) -> None:
    assert run("rules", "show", "nothing").code == run("explain", "PSG999").code == 3
    assert run("explain", "301").out == run("explain", "PSG301").out == run("explain", "psg301").out


def test_a_part_of_a_rules_name_suggests_all_that_hold_it(run: Any) -> None:
    hint = run("rules", "show", "prefix", "--json").json["error"]["hint"]
    assert {"prefix_tuning", "prefix_tuning_mlp"} <= set(re.findall(r"\w+", hint))


@pytest.mark.parametrize("option", ["--name", "--adapter"])
def test_an_adapters_name_is_one_option_and_is_checked_before_the_model(
    run: Any, option: str, tmp_path: Path
) -> None:
    line = ("apply", "no/model", "lora_qv", "-o", tmp_path / "out")
    for name in ("", "a.b", "a b"):
        assert run(*line, option, name, "--json").json["error"]["code"] == "PSG304"
    for command in ("apply", "fold", "export"):
        assert "--name, --adapter ADAPTER" in run(command, "--help").out


OPENING = {
    "export": ("export", "{}", "--to", "peft", "-o", "out"),
    "fold": ("fold", "{}", "-o", "out"),
    "unfold": ("unfold", "{}", "-o", "out"),
    "verify": ("verify", "{}"),
    "check": ("check", "{}", "--for", "peft"),
    "merge": ("merge", "{}=0.5", "-o", "out"),
    "extract": ("extract", "{}/base", "{}/tuned", "-o", "out"),
    "inspect": ("inspect", "{}/x"),
    "diff": ("diff", "{}/x.safetensors", "{}/y.safetensors"),
    "onnx": ("diff", "{}/x.onnx", "{}/y.onnx"),
    "describe": ("diff", "--describe", "{}"),
}


@pytest.mark.parametrize("command", OPENING)
def test_a_path_with_nothing_or_a_file_is_told_in_words(
    run: Any, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("gone", "gone/deeper"):
        error = run(*(word.format(path) for word in OPENING[command]), "--json")
        said = error.json["error"]["message"] + str(error.json["error"]["hint"])
        assert error.code == 3
        assert re.search(r"nothing at '|no model at '|there is no directory '", said), said
        assert "Errno" not in said
    Path("a_file").touch()
    error = run(*(word.format("a_file") for word in OPENING[command]), "--json")
    said = error.json["error"]["message"] + str(error.json["error"]["hint"])
    assert (error.code, "Errno" in said) == (3, False)
    assert command in ("describe", "extract", "inspect") or "is a file, not a directory" in said


def test_what_may_not_be_read_is_told_in_words(tmp_path: Path) -> None:
    file = tmp_path / "surgery.json"
    assert why_unread(file, PermissionError(13, "Permission denied")) == (
        f"{file} cannot be read: Permission denied"
    )
    assert why_unread(tmp_path, IsADirectoryError(21, "Is a directory")) == (
        f"'{tmp_path}' is a directory, not a file"
    )
