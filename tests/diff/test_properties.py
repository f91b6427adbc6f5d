"""What holds of every difference, on captures of real models."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import peftsurgery as ps
from peftsurgery.diff.comparison import diff
from peftsurgery.diff.describing import describe_model
from peftsurgery.diff.description import Description, Node, ShapeClass, TensorFacts, canonical
from peftsurgery.diff.lines import lines
from peftsurgery.diff.script import Script, compare, follow
from peftsurgery.language.loading import load_rules
from tests.diff.real import MAKERS, OTHERS, described, real
from tests.diff.test_script import permuted
from tests.test_house import RULES

NAMES = sorted(MAKERS)
real_models = st.sampled_from(NAMES)
few = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def changed(draw: st.DrawFn) -> tuple[Description, Description]:
    """A model, and the same with some nodes, sizes and layers made otherwise."""
    model = described(draw(real_models))
    classes = dict(model.classes)
    for label in draw(st.lists(st.sampled_from(sorted(classes)), max_size=2)):
        nodes = dict(classes[label].nodes)
        computed = [key for key, node in nodes.items() if node.module and node.op != "read"]
        for key in draw(st.lists(st.sampled_from(computed), max_size=3)) if computed else ():
            nodes[key] = replace(nodes[key], op="another")
        classes[label] = replace(classes[label], nodes=nodes)
    tensors = dict(model.tensors)
    for name in draw(st.lists(st.sampled_from(sorted(tensors)), max_size=2)):
        shape = tuple(size + 1 for size in tensors[name].shape)
        tensors[name] = replace(tensors[name], shape=shape)
    return model, replace(model, classes=classes, tensors=tensors)


def counted(script: Script) -> Counter[str]:
    tables = [graph.edits for graph in script.graphs]
    tables += [script.blocks, script.tensors, script.sites, script.insertions, script.config]
    return Counter(kind for edits in tables for edit in edits for kind in edit.kinds)


def renamed(model: Description) -> Description:
    """The model with another word for every module."""

    def path(text: str) -> str:
        return ".".join(p if p.isdigit() or not p else f"{p}_x" for p in text.split("."))

    def tensor(text: str) -> str:
        owner, _, leaf = text.rpartition(".")
        return f"{path(owner)}.{leaf}" if owner else leaf

    def key(text: str) -> str:
        first, _, rest = text.partition(" ")
        is_tensor = rest.startswith("parameter")
        return f"{tensor(first) if is_tensor else path(first)} {rest}"

    def node(each: Node) -> Node:
        return replace(each, module=(tensor if each.op == "read" else path)(each.module))

    def facts(each: TensorFacts) -> TensorFacts:
        return replace(each, tied=tensor(each.tied))

    classes = {
        label: ShapeClass(each.kind, {k: node(n) for k, n in each.nodes.items()})
        for label, each in model.classes.items()
    }
    return replace(
        model,
        classes=classes,
        blocks={path(each): labels for each, labels in model.blocks.items()},
        tensors={tensor(name): facts(each) for name, each in model.tensors.items()},
        sites={key(name): each for name, each in model.sites.items()},
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_model_against_itself_is_empty(name: str) -> None:
    assert not diff(real(name), real(name), weights=True)


@few
@given(changed())
def test_the_script_makes_the_other_model(pair: tuple[Description, Description]) -> None:
    a, b = pair
    assert canonical(follow(a, compare(a, b), b.kind)) == canonical(b)


@few
@given(changed())
def test_a_difference_mirrors_the_reverse(pair: tuple[Description, Description]) -> None:
    there, back = counted(compare(*pair)), counted(compare(*pair[::-1]))
    mirrored = {"added": "removed", "removed": "added"}
    assert there == Counter({mirrored.get(kind, kind): count for kind, count in back.items()})


@few
@given(real_models, st.randoms(use_true_random=False))
def test_the_order_of_independent_nodes_changes_nothing(name: str, random: Random) -> None:
    model, classes = described(name), {}
    for label, each in model.classes.items():
        order = list(range(len(each.nodes)))
        random.shuffle(order)
        classes[label] = replace(each, nodes=permuted(dict(each.nodes), order))
    assert not compare(model, replace(model, classes=classes))


@pytest.mark.parametrize("name", NAMES)
def test_other_names_of_all_modules_change_names_only(name: str) -> None:
    script = compare(described(name), renamed(described(name)))
    assert script
    assert {kind for edit in script.blocks for kind in edit.kinds} == {"renamed", "changed"}
    assert set(counted(replace(script, blocks=()))) == {"renamed"}
    told = lines(script, described(name), renamed(described(name)))
    assert {line.sign for line in told} == {">"}


def _operated(graph: ps.GraphModel, rule: str) -> ps.OperatedModel:
    """A rule put on a model, after two adapters if it is for adapters that are there already."""
    if "adapters" not in load_rules(rule).with_:
        return ps.apply(graph, rule)
    both = ps.apply(ps.apply(graph, "pfeiffer", name="a"), "pfeiffer", name="b")
    return ps.apply(both, rule, adapters=["a", "b"])


@pytest.mark.slow
@pytest.mark.parametrize("rule", [path.stem for path in RULES])
def test_the_edits_name_what_a_rule_inserted_and_eject_takes_back(rule: str) -> None:
    refused = []
    for name in (*NAMES, *OTHERS):
        try:
            operated = _operated(real(name), rule)
        except ps.SurgeryError as error:
            refused.append(error.code)
            continue
        script = compare(described(name), describe_model(operated))
        told = sorted((edit.new.adapter, edit.new.module) for edit in script.insertions)
        matches = operated.report.matches
        assert told == sorted((each["adapter"], each["module"]) for each in matches)
        assert {kind for edit in script.insertions for kind in edit.kinds} == {"added"}
        back = operated
        for adapter in reversed(operated.adapters):
            back = ps.eject(back, adapter)
        assert not compare(described(name), describe_model(back))
    assert set(refused) <= {"PSG301", "PSG305"}, "a model may lack what a rule changes"
    assert len(refused) < len((*NAMES, *OTHERS)), "it finds something in one of them"


def test_sizes_that_are_asked_for_now_are_one_line_of_a_block() -> None:
    found = diff(real("gpt2"), ps.apply(real("gpt2"), "prompt_tuning", length=3))
    told = [line.text for line in found.summary.lines if line.part == "graph"]
    assert len(told) == 2
    assert all(text.endswith("of another size") for text in told)
