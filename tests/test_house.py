"""The house's own rules, where a test can see them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
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
