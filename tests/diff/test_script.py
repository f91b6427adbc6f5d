"""The edit script makes the second description of the first, and says nothing that is not so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import peftsurgery as ps
from peftsurgery.diff.describing import describe_model
from peftsurgery.diff.description import Description, Node, ShapeClass, canonical
from peftsurgery.diff.lines import lines
from peftsurgery.diff.script import Script, compare, follow
from tests.diff.models import captured
from tests.test_house import RULES

OPS = ("add", "mul", "silu", "linear")
MODULES = ("", "one", "one.two", "three")


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, Node]:
    """A graph of a few operators whose operands are earlier nodes."""
    nodes: dict[str, Node] = {"x": Node("input", "", (), "x", "float32[*, 8]")}
    for number in range(draw(st.integers(0, 12))):
        count = draw(st.integers(1, 2))
        operands = tuple(draw(st.sampled_from(list(nodes))) for _ in range(count))
        module, op = draw(st.sampled_from(MODULES)), draw(st.sampled_from(OPS))
        nodes[f"n{number}"] = Node(op, module, operands, f"({count})", "float32[*, 8]")
    return nodes


@st.composite
def mutated(draw: st.DrawFn, nodes: dict[str, Node]) -> dict[str, Node]:
    """A graph with some nodes made otherwise."""
    made = dict(nodes)
    for key in draw(st.lists(st.sampled_from(list(nodes)), max_size=3)):
        made[key] = replace(made[key], op=draw(st.sampled_from(OPS))) if key != "x" else made[key]
    return made


def model(*blocks: dict[str, Node]) -> Description:
    classes = {f"c{number}": ShapeClass("Block", nodes) for number, nodes in enumerate(blocks)}
    paths = {f"layers.{number}": (f"c{number}",) for number in range(1, len(blocks))}
    return Description("Model", classes, {**paths, "": ("c0",)})


def permuted(nodes: dict[str, Node], order: list[int]) -> dict[str, Node]:
    """The nodes under other keys, in another order in which operands come first."""
    left, made = dict(zip(nodes, order, strict=False)), dict[str, Node]()
    while left:
        free = [k for k in left if all(f"p{o}" in made for o in nodes[k].operands)]
        key = min(free, key=lambda k: left[k])
        node = nodes[key]
        made[f"p{key}"] = replace(node, operands=tuple(f"p{o}" for o in node.operands))
        del left[key]
    return made


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_following_the_script_gives_the_other_model(data: st.DataObject) -> None:
    a = model(*data.draw(st.lists(graphs(), min_size=1, max_size=4)))
    others = [data.draw(mutated(dict(each.nodes))) for each in a.classes.values()]
    more = data.draw(st.lists(graphs(), max_size=2))
    b = model(*others[: data.draw(st.integers(1, len(others)))], *more)
    assert canonical(follow(a, compare(a, b), b.kind)) == canonical(b)
    assert canonical(follow(b, compare(b, a), a.kind)) == canonical(a)


@settings(max_examples=150, deadline=None)
@given(graphs(), st.permutations(range(14)))
def test_the_order_and_the_names_of_nodes_change_nothing(
    nodes: dict[str, Node], order: list[int]
) -> None:
    assert not compare(model(nodes), model(permuted(nodes, order)))
    assert not compare(model(nodes), model(nodes))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_difference_mirrors_the_reverse(data: st.DataObject) -> None:
    nodes = data.draw(graphs())
    a, b = model(nodes), model(data.draw(mutated(nodes)))
    there, back = counted(compare(a, b)), counted(compare(b, a))
    assert there["added"] == back["removed"]
    assert there["removed"] == back["added"]
    assert there["retyped"] == back["retyped"]


def counted(script: Script) -> dict[str, int]:
    kinds = [kind for graph in script.graphs for edit in graph.edits for kind in edit.kinds]
    return {kind: kinds.count(kind) for kind in ("added", "removed", "retyped")}


def applied(graph: ps.GraphModel, rule: str) -> ps.OperatedModel | ps.SurgeryError:
    """What a rule makes of a model, or why it refuses to."""
    try:
        return ps.apply(graph, rule)
    except ps.SurgeryError as error:
        return error


@pytest.mark.parametrize("rule", RULES, ids=lambda path: path.stem)
def test_the_edits_name_what_the_report_says_was_inserted(rule: Path) -> None:
    graph = captured()
    operated = applied(graph, str(rule))
    if isinstance(operated, ps.SurgeryError):
        assert operated.code in ("PSG301", "PSG340"), str(operated)
        return
    a, b = describe_model(graph), describe_model(operated)
    script = compare(a, b)
    report = operated.report
    told = sorted((edit.new.adapter, edit.new.module) for edit in script.insertions)
    assert told == sorted((each["adapter"], each["module"]) for each in report.matches)
    added = {str(edit.after) for edit in script.tensors if edit.before is None}
    inserted = {name for edit in script.insertions for name in edit.new.parameters}
    assert set(report.added) <= added
    tied = {b.tensors[name].tied for name in inserted}
    assert {b.tensors[name].tied for name in added} <= tied
    told = [line for line in lines(script, a, b) if line.sign in "+-"]
    stores = any(each.store for each in ps.load_rules(str(rule)).rules)  # read in another way
    assert {line.part for line in told} - ({"graph"} if stores else set()) == {"insertion"}
    assert {kind for edit in script.insertions for kind in edit.kinds} <= {"added"}
    assert canonical(follow(a, script, b.kind)) == canonical(b)
    assert not compare(b, describe_model(operated))


def test_layers_left_out_of_an_adapter_are_as_they_were() -> None:
    operated = ps.apply(captured(), "lora_qv")
    operated.activate(leave_out=[1])
    found = operated.diff()
    told = [line.where for line in found.summary.lines if line.part == "insertion"]
    assert told == ["layers.{0,2}.attn.q", "layers.{0,2}.attn.v"]
    assert not any(
        "layers.1" in str(edit.after) for edit in found.script.tensors if edit.before is None
    )
