"""Names of equal blocks as one, and back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from peftsurgery.diff.names import expanded, folded

NAMES = st.builds(
    lambda a, b, leaf: f"layers.{a}.experts.{b}.{leaf}",
    st.integers(0, 4),
    st.integers(0, 3),
    st.sampled_from(["up", "down"]),
)


def test_ranges_name_what_is_there_and_exceptions_show() -> None:
    names = [f"h.{n}.q" for n in range(12) if n != 5]
    assert folded(names) == [("h.{0..4,6..11}.q", 11)]
    assert folded(["h.3.q"]) == [("h.3.q", 1)]
    assert folded(["lm2.q", "lm3.q"]) == [("lm2.q", 1), ("lm3.q", 1)]
    grid = [f"h.{a}.e.{b}" for a in range(3) for b in range(4)]
    assert folded(grid) == [("h.{0..2}.e.{0..3}", 12)]
    assert folded(grid[1:]) == [("h.0.e.{1..3}", 3), ("h.{1..2}.e.{0..3}", 8)]


@given(st.lists(NAMES, unique=True))
def test_folding_loses_and_invents_no_name(names: list[str]) -> None:
    found = folded(names)
    assert sum(count for _, count in found) == len(names)
    assert sorted(name for short, _ in found for name in expanded(short)) == sorted(names)
