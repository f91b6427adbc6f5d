"""Text that is on every machine: the docstrings of installed packages, labelled by their package.

Sources are parsed, not imported. A package's own name is struck out of its docstrings, so that
it is the way of writing that has to be recognised.
"""

import ast
import importlib.util
import random
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGES = (
    "torch",
    "numpy",
    "transformers",
    "networkx",
    "sympy",
    "pydantic",
    "rich",
    "huggingface_hub",
)
Labelled = list[tuple[str, int]]


def collect(train: int, held_out: int, seed: int = 0) -> tuple[Labelled, Labelled]:
    """Training and held-out docstrings; every package has at most that many of each.

    The split is random: a held-out text may come from a file that training texts are from.
    """
    learn: Labelled = []
    judge: Labelled = []
    for label, package in enumerate(PACKAGES):
        texts = list(_first(_docstrings(package, seed), train + held_out))
        random.Random(seed).shuffle(texts)
        judge += [(text, label) for text in texts[-held_out:]]
        learn += [(text, label) for text in texts[:-held_out]]
    return learn, judge


def _first(texts: Iterator[str], count: int) -> Iterator[str]:
    """The first ``count`` texts that do not begin like an earlier one."""
    seen: set[str] = set()
    for text in texts:
        if len(seen) == count:
            return
        if text[:60] not in seen:
            seen.add(text[:60])
            yield text


def _docstrings(package: str, seed: int) -> Iterator[str]:
    """Docstrings on one line, at most four a file; the files in random order."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return
    root = Path(spec.submodule_search_locations[0])
    files = [path for path in sorted(root.rglob("*.py")) if path.stat().st_size < 60_000]
    random.Random(seed).shuffle(files)
    own_name = re.compile(package, re.IGNORECASE)
    for path in files:
        taken = 0
        for text in _texts(path):
            text = own_name.sub("it", text)
            if len(text) >= 60 and taken < 4:
                taken += 1
                yield text


def _texts(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield " ".join(text.split())
