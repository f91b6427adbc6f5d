"""Rule files at random: whatever a file says, it is read, checked, applied, folded and saved, or
refused by code.

Files are made from the schema's own keys and the table of kinds, so that new ones are covered.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.language.initial import INITIALISERS
from peftsurgery.language.kinds import KINDS
from peftsurgery.language.operators import OPERATORS, Operator
from peftsurgery.language.roles import VOCABULARY
from peftsurgery.language.schema import Expect, Param, Rule
from peftsurgery.language.where import Where


class Tiny(nn.Module):
    """A linear, an embedding, a norm, a convolution, an attention and residual additions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(7, 8), nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8, bias=False)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = (
            part.unflatten(-1, (2, 4)).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, -1)
        )
        o = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(o.transpose(1, 2).flatten(2))
        x = x + self.down(torch.relu(self.up(x)))
        result: Tensor = self.conv((x * self.scale).transpose(1, 2))
        return result


IDS = torch.arange(10).reshape(2, 5) % 7


@cache
def graph() -> ps.GraphModel:
    torch.manual_seed(0)
    return ps.capture(Tiny().eval().requires_grad_(False), inputs=(IDS,))


JUNK = st.sampled_from([None, True, 0, -1, 2.5, "", "x", [], ["y"], {}, {"a": 1}, "1e400"])
SETTINGS = {"rank": 2, "share": 0.1, "on": True, "word": "relu", "items": [0, 1]}
PARAMS = ("A", "B")


def expressions(names: list[str], calls: list[str]) -> st.SearchStrategy[str]:
    """Expressions of the language's grammar, with a few that are not."""
    leaves = st.sampled_from([*names, "0", "1", "2.5", "-1", "None", "(1, 2)"])

    def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        binary = st.sampled_from(["+", "-", "*", "/", "//", "%", "@", "**"])
        call = st.sampled_from(calls)
        return st.one_of(
            st.builds(lambda a, o, b: f"({a} {o} {b})", inner, binary, inner),
            st.builds(lambda f, a: f"{f}({a})", call, inner),
            st.builds(lambda f, a, b: f"{f}({a}, {b})", call, inner, inner),
            st.builds(lambda f, a, b, c: f"{f}({a}, {b}, {c})", call, inner, inner, inner),
            st.builds(lambda a: f"{a}[:, None]", inner),
            st.builds(lambda a, b, c: f"({a} if {b} > 1 else {c})", inner, inner, inner),
        )

    return st.recursive(leaves, larger, max_leaves=4)


def clauses() -> st.SearchStrategy[dict[str, Any]]:
    likely = {
        "role": st.sampled_from(sorted(VOCABULARY)),
        "path": st.sampled_from([".*", "up|down", "qkv.*", "(", "scale"]),
        "kind": st.sampled_from(["self", "bias", "weight", "cross"]),
        "layers": st.sampled_from(["0..", "1..2", "x", 0]),
        "op": st.sampled_from(["linear", "sdpa"]),
        "type": st.sampled_from(["Linear", "LayerNorm"]),
    }
    every = [field.alias or name for name, field in Where.model_fields.items()]
    keys = st.sampled_from([*every, *(8 * sorted(likely))])
    value = keys.flatmap(lambda key: st.tuples(st.just(key), likely.get(key, JUNK)))
    return st.one_of(st.just({}), st.just({}), st.lists(value, max_size=1).map(dict))


@st.composite
def rules(draw: st.DrawFn) -> dict[str, Any]:
    """A rule: its likely keys with likely values, now and then any key with any value."""
    kind = KINDS[draw(st.sampled_from(sorted(KINDS)))]
    chosen = draw(st.lists(st.sampled_from(PARAMS), unique=True))
    names, calls = (
        sorted(kind.names | SETTINGS.keys() | {*chosen}),
        sorted({*OPERATORS, *kind.functions}),
    )
    text = expressions(names, calls)
    numbers = expressions([*kind.sizes, *SETTINGS], ["sqrt", "floor"])
    sizes = st.sampled_from([*kind.sizes, "rank", "1", "3"]) | numbers
    starts = st.sampled_from(sorted(INITIALISERS)) | expressions([*kind.weights, "rank"], calls)
    likely = {"shape": st.lists(sizes, max_size=3), "init": starts}
    params = {name: {"shape": draw(likely["shape"]), "init": draw(starts)} for name in chosen}
    rarely = st.integers(0, 9)
    for key in draw(st.sampled_from(sorted(Param.model_fields)).map(lambda k: [k])) * (
        draw(rarely) == 9
    ):
        for param in params.values():
            param[key] = draw(likely.get(key, JUNK))
    targets = sorted({*kind.values, *kind.weights}) or ["y"]
    values = st.dictionaries(st.sampled_from(targets), text, min_size=1, max_size=2)
    weights = st.dictionaries(st.sampled_from(sorted(kind.weights) or ["W"]), text, max_size=2)
    rule: dict[str, Any] = {"match": kind.name, "params": params, "where": draw(clauses())}
    if draw(rarely) == 9:
        rule["expect"] = draw(
            st.dictionaries(st.sampled_from(sorted(Expect.model_fields)), JUNK, max_size=1) | JUNK
        )
    if draw(rarely):
        rule["rewrite"] = draw(values | text)
    if kind.weights and "rewrite" in rule and draw(st.integers(0, 2)) == 0:
        rule["fold"] = draw(weights | text)
    if draw(st.integers(0, 3)) == 0:
        rule["let"] = {"t": draw(text)}
    if draw(st.integers(0, 3)) == 0:
        rule["train"] = True
    if draw(rarely) == 9:
        key = draw(st.sampled_from(sorted(f.alias or n for n, f in Rule.model_fields.items())))
        rule[key] = draw(JUNK | text | st.dictionaries(st.sampled_from(["W", "A", "sum"]), text))
    return rule


def _is_elementwise(word: Operator) -> bool:
    """Whether a word can be called with one tensor and gives one of that shape."""
    specimen = torch.rand(2, 3)
    try:
        word.signature.bind(specimen)
        return isinstance(made := word.function(specimen), Tensor) and made.shape == (2, 3)
    except (TypeError, RuntimeError, ValueError, IndexError):
        return False


HELD = ("linear", "embedding", "conv", "attention", "residual", "norm", "parameter")
ELEMENTWISE = sorted(name for name, word in OPERATORS.items() if _is_elementwise(word))


def keeping(name: str, params: list[str]) -> st.SearchStrategy[str]:
    """Expressions that have the shape of a value, whose rewrite is therefore likely to stand."""
    leaves = st.sampled_from([name, *params, "share", "rank", "2.5", "-1"])

    def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        return st.one_of(
            st.builds(lambda a, o, b: f"({a} {o} {b})", inner, st.sampled_from("+-*"), inner),
            st.builds(lambda f: f"{f}({name})", st.sampled_from(ELEMENTWISE)),
            st.builds(lambda a, b, c: f"({a} if {b} > 1 else {c})", inner, st.just("rank"), inner),
        )

    return st.builds(
        lambda o, text: f"{name} {o} {text}",
        st.sampled_from("+-*"),
        st.recursive(leaves, larger, max_leaves=4),
    )


@st.composite
def sound_rules(draw: st.DrawFn) -> dict[str, Any]:
    """A rule that keeps the shape of what it rewrites: most of these are applied and folded."""
    folds = draw(st.integers(0, 3)) < 3
    kinds = [name for name in HELD if not folds or KINDS[name].weights]
    kind = KINDS[draw(st.sampled_from(kinds))]
    chosen = draw(st.lists(st.sampled_from(PARAMS), unique=True))
    starts = st.sampled_from(["zeros", "ones", "normal(0.1)", "uniform(-1, 1)"])
    params = {name: {"shape": ["1"], "init": draw(starts)} for name in chosen}
    target = kind.weights[0] if folds else kind.result or kind.weights[0]
    rule: dict[str, Any] = {"match": kind.name, "params": params}
    rule["rewrite"] = {target: draw(keeping(target, chosen))}
    if folds:
        rule["fold"] = dict(rule["rewrite"])
    if draw(st.integers(0, 3)) == 0:
        rule["train"] = True
    return rule


def files(made: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Files of one or two rules."""
    return st.lists(made, min_size=1, max_size=2).map(
        lambda rules: {"name": "t", "with": SETTINGS, "rules": rules}
    )


def go_through(document: dict[str, Any], reached: Counter[str]) -> None:
    """Read, check, apply, call, train, fold, save and load: any refusal is a SurgeryError.

    What the file got through is counted in ``reached``.
    """
    file = ps.parse_rules(yaml.safe_dump(document))
    with contextlib.suppress(ps.SurgeryError):
        str(ps.check_rules(file))
    operated = ps.apply(graph(), file)
    reached["applied"] += 1
    assert str(operated.report)
    with contextlib.suppress(ps.SurgeryError):
        operated(IDS)
        reached["called"] += 1
    with contextlib.suppress(ps.SurgeryError):
        ps.fold(operated)
        reached["folded"] += 1
    folder = Path(tempfile.mkdtemp())
    try:
        operated.save(folder / "saved")
        ps.load(folder / "saved", graph())
        reached["loaded"] += 1
    finally:
        shutil.rmtree(folder)
    assert ps.eject(operated) is graph()


def tried(made: st.SearchStrategy[dict[str, Any]], count: int) -> Counter[str]:
    """How far so many files got, the same ones every time; each ends in a result or a code."""
    reached: Counter[str] = Counter()

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(made)
    def each(document: dict[str, Any]) -> None:
        try:
            go_through(document, reached)
        except ps.SurgeryError as error:
            reached[error.code] += 1

    each()
    return reached


def test_whatever_a_rule_file_says_ends_in_a_result_or_a_code() -> None:
    reached = tried(files(rules()), 20)
    assert len(reached) > 4, f"the files are all alike: {reached}"


@pytest.mark.slow
def test_whatever_keeps_the_shape_of_what_it_rewrites_is_mostly_applied() -> None:
    reached = tried(files(sound_rules()), 20)
    assert reached["applied"] >= 12, reached
    assert reached["called"] >= 12, reached
    assert reached["folded"] >= 6, reached
    assert reached["loaded"] == reached["applied"]


def test_symbolic_sizes_that_cannot_be_equal_are_refused_by_code() -> None:
    rules = [{"match": "conv", "rewrite": {"W": "sigmoid(x) @ y"}}]
    with pytest.raises(ps.SurgeryError, match="PSG116"):
        go_through({"name": "t", "with": SETTINGS, "rules": rules}, Counter())
