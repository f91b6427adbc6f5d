"""The house's own rules, where a test can see them."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "peftsurgery"
RULES = sorted((ROOT / "rules").glob("*.yaml"))
MODULES = sorted(PACKAGE.rglob("*.py"))

# What the methods are called: by their rule files, and by the libraries that have them too.
METHODS = {path.stem for path in RULES} | {
    *("lora", "dora", "adalora", "ia3", "bitfit", "qlora", "prefix", "prompt", "fusion"),
    *("prefix_tuning", "prompt_tuning", "p_tuning", "houlsby", "pfeiffer", "mam", "unipelt"),
    *("seq_bn", "double_seq_bn", "par_bn", "pissa", "olora"),
}
ARCHITECTURES = {name.lower() for name in CONFIG_MAPPING_NAMES}

# Which rooms a room may look into: down the list only.
BELOW = {
    "cli": {"formats", "diff", "checkpoint", "training", "surgery", "language", "anatomy"},
    "formats": {"training", "surgery", "language", "anatomy"},
    "diff": {"surgery", "language", "anatomy"},
    "checkpoint": {"surgery", "language", "anatomy"},
    "training": {"surgery", "language", "anatomy"},
    "surgery": {"language", "anatomy"},
    "language": {"anatomy"},
    "anatomy": set[str](),
    "capture": set[str](),
    "codes": set[str](),
}


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.stem)
def test_a_method_is_one_page(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_decided_by_the_name_of_a_method_or_an_architecture(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {name.lower() for name in decided_by(tree)}
    assert not names & (METHODS | ARCHITECTURES)


def decided_by(tree: ast.AST) -> Iterator[str]:
    """The texts that code compares with, matches on or looks up."""
    for node in ast.walk(tree):
        match node:
            case ast.Compare():
                yield from texts(*node.comparators, node.left)
            case ast.MatchValue():
                yield from texts(node.value)
            case ast.Dict():
                yield from texts(*(key for key in node.keys if key is not None))
            case ast.Call(func=ast.Attribute(attr="startswith" | "endswith" | "get")):
                yield from texts(*node.args)
            case _:
                pass


def texts(*nodes: ast.AST) -> Iterator[str]:
    for node in nodes:
        for part in ast.walk(node):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield part.value


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_looks_only_into_rooms_below_it(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0]
    if room not in BELOW:
        return  # the package's own files: the public table and the errors
    allowed = {room, "capture", "codes"} | BELOW[room]
    seen = {target for target in imported(path) if (PACKAGE / target).is_dir()}
    assert seen <= allowed


def imported(path: Path) -> Iterator[str]:
    """The rooms that a module imports from."""
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == depth and node.module:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peftsurgery."):
            yield str(node.module).split(".")[1]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_holds_one_idea(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 400
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno <= 50, f"{node.name} is long"


METADATA = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# The packages that are imported under another name.
DISTRIBUTIONS = {"yaml": "PyYAML"}
EXTRAS = METADATA["optional-dependencies"]


def names_of(requirements: list[str]) -> set[str]:
    """The packages that a list of requirements names, spelt in one way."""
    return {spelt(re.split(r"[ <>=!~;\[]", line, maxsplit=1)[0]) for line in requirements}


def spelt(name: str) -> str:
    return name.lower().replace("-", "_")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_is_imported_is_declared(path: Path) -> None:
    """In the dependencies; in an extra if it is imported inside a function."""
    always = names_of(METADATA["dependencies"])
    extras = set().union(*(names_of(lines) for name, lines in EXTRAS.items() if name != "dev"))
    for name, at_the_top in third_parties(path):
        package = spelt(DISTRIBUTIONS.get(name, name))
        assert package in always or (package in extras and not at_the_top), name


def third_parties(path: Path) -> Iterator[tuple[str, bool]]:
    """The packages that a module imports, and whether it does so when it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        for name in named_by(node):
            top = name.partition(".")[0]
            if top not in sys.stdlib_module_names and top != PACKAGE.name:
                yield top, node not in inside


def named_by(node: ast.AST) -> Iterator[str]:
    """The modules that a node imports by a name that stands there."""
    match node:
        case ast.Import(names=names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(level=0, module=str(module)):
            yield module
        case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(m))]):
            yield m
        case _:
            pass


def test_what_the_walk_finds_is_what_is_imported() -> None:
    """The checks above see imports of every kind."""
    found = {name for path in MODULES for name, _ in third_parties(path)}
    assert {"torch", "transformers", "yaml", "onnxruntime", "bitsandbytes", "sympy"} <= found
    assert "networkx" in names_of(METADATA["dependencies"])


def test_the_newest_version_that_passed_is_the_end_of_the_range() -> None:
    """Users get a version that was tested; the one above it is not among them."""
    (line,) = (need for need in METADATA["dependencies"] if need.startswith("transformers"))
    pins = (ROOT / "tools" / "constraints-newest.txt").read_text(encoding="utf-8")
    newest = next(pin for pin in pins.splitlines() if pin.startswith("transformers=="))
    tested = SpecifierSet(line.removeprefix("transformers"))
    version = Version(newest.removeprefix("transformers=="))
    assert version in tested
    assert Version(f"{version.major}.{version.minor + 1}.0") not in tested
