"""Environments: nothing is made before it is read, and nothing twice."""

from __future__ import annotations

from peftsurgery.language.environment import Environment, mapped


def test_a_value_is_made_when_it_is_first_read_and_kept() -> None:
    made: list[str] = []

    def make(name: str) -> int:
        made.append(name)
        return len(made)

    names = Environment({"known": 0}, {"one": make, "other": make})
    assert list(names) == ["known", "one", "other"]
    assert "one" in names
    assert made == []
    assert [names["other"], names["other"], names["known"]] == [1, 1, 0]
    assert made == ["other"]
    twice = mapped(names, lambda value: 2 * value)
    assert [twice["other"], twice["one"]] == [2, 4]


def test_what_is_known_or_bound_is_not_made() -> None:
    names = Environment({"a": 1}, {"a": lambda _: 2, "b": lambda _: 3})
    names.bind("b", 4)
    assert dict(names) == {"a": 1, "b": 4}
