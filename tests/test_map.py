"""The map of the house is true: its rooms are there, and its flows call what they say, in order."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftsurgery as ps

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "peftsurgery"
TEXT = (PACKAGE / "README.md").read_text(encoding="utf-8")
ROOMS, *FLOWS = re.split(r"(?m)^## ", TEXT)[1:]
NAMED = re.compile(r"`([a-z_]+(?:\.[A-Za-z_]+)+)`")
RULE = """
name: one
with: {rank: 2}
rules:
  - match: linear
    where: {role: ffn.up}
    params:
      A: {shape: [rank, in], init: normal(1)}
      B: {shape: [out, rank], init: normal(1)}
    rewrite: y + linear(linear(x, A), B)
    fold: W + B @ A
"""


def flow(title: str) -> list[str]:
    """The functions that a flow names, in its order."""
    (body,) = (part for part in FLOWS if part.startswith(title))
    return NAMED.findall(body)


def found(name: str) -> Any:
    """What a dotted name of the package means."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if (PACKAGE.joinpath(*parts[:end]).with_suffix(".py")).is_file():
            value: Any = importlib.import_module(".".join(["peftsurgery", *parts[:end]]))
            for part in parts[end:]:
                value = inspect.getattr_static(value, part)
            return value
    raise LookupError(name)


def code_of(name: str) -> CodeType:
    """The code that runs when what a name means is called."""
    value = found(name)
    if isinstance(value, type):
        value = inspect.getattr_static(value, "__init__")
    for wrapped in ("__func__", "func", "fget"):
        value = getattr(value, wrapped, value)
    code: CodeType = inspect.unwrap(value).__code__
    return code


@contextmanager
def traced(names: list[str]) -> Iterator[list[str]]:
    """Within the context the calls of these functions are noted, in all threads, in order."""
    wanted: Mapping[CodeType, str] = {code_of(name): name for name in names}
    calls: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code in wanted:
            calls.append(wanted[frame.f_code])

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def check(title: str, run: Callable[[], Any]) -> None:
    """Every function of a flow is called, each after the one before it."""
    names = flow(title)
    assert len(names) >= 10
    with traced(names) as calls:
        run()
    rest = iter(calls)
    for name in names:
        assert name in calls, f"{name} is not called"
        assert name in rest, f"{name} is not called after those before it: {calls}"


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config).eval()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@functools.cache
def graph() -> ps.GraphModel:
    return ps.capture(Stack(), {"x": torch.randn(2, 3, 4)})


def test_the_rooms_of_the_map_are_the_rooms_there_are_in_order() -> None:
    rooms = [name.rstrip("/") for name in re.findall(r"(?m)^\| `([\w/.]+)`", ROOMS)]
    there = {path.parent for path in PACKAGE.glob("*/**/*.py")} - {PACKAGE / "rules"}
    folders = {str(path.relative_to(PACKAGE)) for path in there}
    files = {path.name for path in PACKAGE.glob("*.py")}
    files -= {"__init__.py", "__main__.py", "version.py"}
    named = {room for room in rooms if not room.endswith(".py")}
    above = {room.partition("/")[0] for room in named if "/" in room}
    assert named | above == {folder for folder in folders if "__pycache__" not in folder}
    assert {room for room in rooms if room.endswith(".py") and "/" not in room} == files
    assert all((PACKAGE / room).exists() for room in rooms)


def test_a_rule_becomes_a_graph_as_the_map_says() -> None:
    check("From a rule's text", lambda: ps.apply(graph(), ps.parse_rules(RULE), rank=3))


def test_a_weight_goes_from_the_base_to_a_file_as_the_map_says(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    ps.apply(ps.capture(base), ps.parse_rules(RULE)).save(tmp_path / "surgery")

    def run() -> None:
        ps.fold_to_directory(
            tmp_path / "surgery", tmp_path / "out", str(tmp_path / "base"), verify=True
        )

    check("From a base", run)


def test_a_base_is_folded_on_files_as_the_map_says(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    ps.apply(ps.capture(base), ps.parse_rules(RULE)).save(tmp_path / "surgery")
    folders = (tmp_path / name for name in ("surgery", "base", "out"))
    check("The same on files", lambda: ps.fold_checkpoint(*folders))


def test_a_call_is_served_as_the_map_says() -> None:
    operated = ps.apply(graph(), ps.parse_rules(RULE), name="a")
    with torch.no_grad():
        check("A call", lambda: operated(torch.randn(2, 5, 4), adapters=["a", None]))
