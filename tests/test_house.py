"""The house's own rules, where a test can see them."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import networkx as nx
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

# Where the package's files are, from the lowest to the highest: a file may import what is in its
# own room and in those before it. Rooms of surgery are listed by themselves.
ORDER = (
    *(
        "version",
        "lazily",
        "offered",
        "reach",
        "uncollected",
        "codes",
        "errors",
        "installed",
        "made_with",
    ),
    *(
        "quiet",
        "notebook",
        "buffers",
        "files",
        "tensor_file",
        "stand_ins",
        "model_files",
        "fingerprint",
    ),
    "remote",
    *("tokenizer_files", "finite_tensors", "places", "outputs", "arguments"),
    *("capture", "anatomy", "language", "checkpoint"),
    *("surgery.plan", "surgery.fourbit", "surgery.rewrite", "surgery.model", "surgery.applying"),
    *("surgery.asking", "surgery.fold", "surgery.combine", "surgery.loading"),
    *("training", "formats", "diff", "cli", "__init__", "__main__"),
)
# Rooms that are beside each other, and do not look into one another.
APART = {("surgery.combine", "surgery.fold"), ("diff", "formats"), ("diff", "training")}


@cache
def parsed(path: Path) -> ast.Module:
    """A module's code."""
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """All of a module's code, node by node."""
    return tuple(ast.walk(parsed(path)))


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.stem)
def test_a_method_is_one_page(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_decided_by_the_name_of_a_method_or_an_architecture(path: Path) -> None:
    tree = parsed(path)
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


def test_a_room_looks_only_into_rooms_below_it() -> None:
    """Whatever is imported, for types alone and inside functions too."""
    places = {room_of(name) for name in GRAPH}
    assert places == set(ORDER)  # every file has its place, and every place has files
    for name, other in GRAPH.edges:
        room, seen = room_of(name), room_of(other)
        assert ORDER.index(seen) <= ORDER.index(room), f"{name} imports {other}"
        assert (room, seen) not in APART, f"{name} imports {other}"


def test_no_modules_import_each_other() -> None:
    circles = [sorted(part) for part in nx.strongly_connected_components(GRAPH) if len(part) > 1]
    assert circles == []
    assert not list(nx.selfloop_edges(GRAPH))


def test_imports_name_the_whole_path() -> None:
    """So a file can be found from any other, and moved."""
    for path in MODULES:
        for node in nodes(path):
            assert not (isinstance(node, ast.ImportFrom) and node.level), path


def test_no_two_classes_have_one_name() -> None:
    found: dict[str, list[str]] = {}
    for path in MODULES:
        for node in nodes(path):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name.lstrip("_"), []).append(str(path.relative_to(PACKAGE)))
    assert {name: paths for name, paths in found.items() if len(paths) > 1} == {}


def named(path: Path) -> str:
    """A module's name in the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts if parts == ("__init__",) else (p for p in parts if p != "__init__"))


def room_of(name: str) -> str:
    """The place of a module in ORDER."""
    first, _, rest = name.partition(".")
    if first != "surgery":
        return first
    return f"surgery.{rest.partition('.')[0]}" if rest else "surgery.plan"


def import_graph() -> nx.DiGraph[str]:
    """Which module of the package imports from which, at any depth of its code."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    names = {named(path) for path in MODULES}
    graph.add_nodes_from(names)
    for path in MODULES:
        for node in nodes(path):
            for target in targets(node, names):
                graph.add_edge(named(path), target)
    return graph


def targets(node: ast.AST, names: set[str]) -> Iterator[str]:
    """The modules of the package that a statement imports from."""
    prefix = f"{PACKAGE.name}."
    match node:
        case ast.Import(names=aliases):
            yield from (a.name.removeprefix(prefix) for a in aliases if a.name.startswith(prefix))
        case ast.ImportFrom(module=str(module), names=aliases) if module == PACKAGE.name:
            yield from (a.name if a.name in names else "__init__" for a in aliases)
        case ast.ImportFrom(module=str(module), names=aliases) if module.startswith(prefix):
            base = module.removeprefix(prefix)
            inner = [f"{base}.{alias.name}" for alias in aliases]
            yield from ((name if name in names else base) for name in inner)
        case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(m))]):
            if m.partition(".")[0] == PACKAGE.name:
                yield m.removeprefix(prefix) if m.startswith(prefix) else "__init__"
        case _:
            pass


GRAPH = import_graph()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_holds_one_idea(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 50, f"{node.name} is long"


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


@cache
def third_parties(path: Path) -> tuple[tuple[str, bool], ...]:
    """The packages that a module imports, and whether it does so when it is imported itself."""
    inside = {
        node
        for function in nodes(path)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    found = ((name.partition(".")[0], node) for node in nodes(path) for name in named_by(node))
    return tuple(
        (top, node not in inside)
        for top, node in found
        if top not in sys.stdlib_module_names and top != PACKAGE.name
    )


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
