"""The command starts quickly, because it imports torch only when it has something to compute."""

import subprocess
import sys

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
