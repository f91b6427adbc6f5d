"""The command starts quickly, because it imports torch only when it has something to compute."""

import subprocess
import sys
from pathlib import Path

import pytest

import peftsurgery

SHOW_HEAVY = """
import sys
from peftsurgery.cli.root import root
try:
    root.main({arguments!r})
except SystemExit as end:
    assert end.code == 0, end.code
print([name for name in ("torch", "transformers", "pydantic", "rich") if name in sys.modules])
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["apply", "--help"], ["rules", "--help"], ["--version"], ["explain"]]
)
def test_help_and_explanations_import_nothing_heavy(arguments: list[str]) -> None:
    script = SHOW_HEAVY.format(arguments=arguments)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "arguments",
    [["ls"], ["ls", "--json"], ["show", "dora"], ["show", "qlora"], ["words"], ["schema"]],
    ids=" ".join,
)
def test_rules_are_listed_shown_and_described_without_torch(arguments: list[str]) -> None:
    script = SHOW_HEAVY.format(arguments=["rules", *arguments])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch" not in done.stdout.splitlines()[-1]
    assert "transformers" not in done.stdout.splitlines()[-1]


def test_a_rule_is_copied_without_torch(tmp_path: Path) -> None:
    script = SHOW_HEAVY.format(arguments=["rules", "cp", "lora_qv", str(tmp_path / "own.yaml")])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch" not in done.stdout.splitlines()[-1]
    assert (tmp_path / "own.yaml").read_text().startswith("name: lora_qv")


def test_the_package_is_a_module_to_run() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "peftsurgery", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: peftsurgery ")


@pytest.mark.slow
def test_public_functions_keep_their_meaning_once_subpackages_are_imported() -> None:
    script = (
        "import peftsurgery as ps, peftsurgery.capture, peftsurgery.language.loading\n"
        "assert [callable(getattr(ps, name)) for name in ('capture', 'load_rules')] == [True] * 2\n"
        "from peftsurgery import capture\n"
        "assert capture is ps.capture and capture.__module__.startswith('peftsurgery.capture')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_misspelt_public_name_is_an_attribute_error() -> None:
    name = "aply"
    with pytest.raises(AttributeError, match=name):
        getattr(peftsurgery, name)
