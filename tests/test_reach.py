"""A walk gives each thing once, goes on from all but its stops, and looks no further than asked."""

from __future__ import annotations

import networkx as nx

from peftsurgery.reach import reach

GRAPH = {"a": "bc", "b": "d", "c": "da", "d": "e", "e": ""}


def test_it_reaches_what_networkx_reaches_each_once() -> None:
    graph = nx.DiGraph([(one, other) for one, others in GRAPH.items() for other in others])
    for start in GRAPH:
        found = list(reach([start], GRAPH.__getitem__))
        assert len(found) == len(set(found))
        assert {*found} == nx.descendants(graph, start) | {start}


def test_it_gives_what_it_is_stopped_at_and_nothing_behind() -> None:
    assert {*reach("a", GRAPH.__getitem__, "d".__eq__)} == {*"abcd"}
    assert [*reach("d", GRAPH.__getitem__, "d".__eq__)] == ["d"]


def test_it_looks_no_further_than_it_is_asked() -> None:
    asked: list[str] = []

    def following(name: str) -> str:
        asked.append(name)
        return GRAPH[name]

    assert "c" in reach("a", following)
    assert asked == ["a"]
