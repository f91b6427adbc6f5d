"""The public functions: whatever they are given, they answer, or refuse by code."""

from __future__ import annotations

import contextlib
import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftsurgery as ps
from peftsurgery.offered import offered

WRONG: dict[str, Any] = {
    "None": None,
    "a plain module": nn.Linear(4, 4),
    "a number": 3,
    "a path that is not there": Path("not") / "there",
    "an object": object(),
    "a list": [],
}


@cache
def captured() -> ps.GraphModel:
    return ps.capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), inputs=(torch.ones(2, 4),))


@cache
def operated() -> ps.OperatedModel:
    rules = "name: t\nrules: [{match: linear, params: {A: {shape: [out, in]}}, "
    return ps.apply(
        captured(), ps.parse_rules(rules + "rewrite: 'y + linear(x, A)', fold: W + A}]")
    )


# What each argument would be, so that the others are right while one is wrong.
RIGHT: dict[str, Callable[[], Any]] = {
    "model": operated,
    "rules": lambda: "lora_qv",
    "name": lambda: "t",
    "directory": lambda: Path("not") / "there",
    "path": lambda: Path("not") / "there",
    "spec": lambda: Path("not") / "there",
    "out": lambda: Path("not") / "there" / "out",
    "text": lambda: "name: t",
    "weights": lambda: {"t": 1.0},
    "lr": lambda: 1e-3,
}
FUNCTIONS = [
    name
    for name in ps.__all__
    if not isinstance(getattr(ps, name), type) or name in ("RankAllocator", "AllocateRanks")
]


def cases() -> Iterator[Any]:
    for function in FUNCTIONS:
        for argument in inspect.signature(getattr(ps, function)).parameters.values():
            if argument.kind is not inspect.Parameter.VAR_KEYWORD:
                for wrong in WRONG:
                    yield pytest.param(
                        function, argument.name, wrong, id=f"{function}-{argument.name}-{wrong}"
                    )


@pytest.mark.parametrize(("function", "argument", "wrong"), cases())
def test_a_wrong_argument_of_a_public_function_is_refused_by_code(
    function: str, argument: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    called = getattr(ps, function)
    needed = [p.name for p in inspect.signature(called).parameters.values() if p.default is p.empty]
    given = {name: RIGHT[name]() for name in needed if name in RIGHT and name != argument}
    with contextlib.suppress(ps.SurgeryError):
        called(**{**given, argument: WRONG[wrong]})
    assert not any(tmp_path.iterdir()) or function in ("to_peft", "export_onnx")


@pytest.mark.parametrize("function", ["fold", "fold_error", "eject", "flatten", "to_peft", "apply"])
def test_a_plain_module_is_refused_where_a_captured_model_is_meant(function: str) -> None:
    rest = {"apply": ("lora_qv",), "to_peft": ("out",)}.get(function, ())
    with pytest.raises(ps.SurgeryError, match=r"PSG904|PSG309|PSG511"):
        getattr(ps, function)(nn.Linear(2, 2), *rest)


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_pickling_is_refused_by_code_with_the_way_to_save(protocol: int, tmp_path: Path) -> None:
    for model in (captured(), operated(), nn.Sequential(operated())):
        with pytest.raises(ps.SurgeryError, match=r"save\("):
            pickle.dumps(model, protocol)
        with pytest.raises(ps.SurgeryError, match=r"save\("):
            torch.save(model, tmp_path / "model.pt", pickle_protocol=max(protocol, 2))


def test_a_state_dict_is_pickled_and_a_model_is_copied(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    torch.save(operated().state_dict(), tmp_path / "state.pt")
    again = torch.load(tmp_path / "state.pt", weights_only=True)
    assert again.keys() == operated().state_dict().keys()
    for model in (captured(), operated()):
        twin, same = copy.deepcopy(model), copy.copy(model)
        assert type(twin) is type(model)
        assert torch.equal(twin(x), model(x))
        assert torch.equal(same(x), model(x))
        assert all(a is not b for a, b in zip(twin.parameters(), model.parameters(), strict=True))


def test_what_rooms_below_are_offered_is_the_public_function() -> None:
    assert offered("diff") is ps.diff
