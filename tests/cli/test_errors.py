"""Whatever goes wrong ends in a coded error on the right stream and the right exit code."""

import json
import os
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
        (["fold", "surgery"], "--output OUT"),
        (["explain", "PSG30"], "did you mean 'PSG3"),
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
    ],
)
def test_bad_input_is_coded(run: Any, arguments: list[str], code: str, exit_code: int) -> None:
    outcome = run(*arguments, "--json")
    assert outcome.json["error"]["code"] == code
    assert outcome.code == exit_code


def test_a_reader_that_goes_away_is_not_complained_about() -> None:
    command = [sys.executable, "-m", "peftsurgery", "explain", "--json"]
    reading, writing = os.pipe()
    with subprocess.Popen(command, stdout=writing, stderr=subprocess.PIPE, text=True) as process:
        os.close(writing)
        os.close(reading)
        assert process.stderr is not None
        assert process.stderr.read() == ""


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
