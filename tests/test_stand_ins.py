"""Blocks of files elsewhere: each is asked for once by who reads on, and the last few are kept."""

from collections.abc import Sequence

import pytest

from peftsurgery import stand_ins
from peftsurgery.stand_ins import FolderStandIn, Range

CONTENT = bytes(range(100))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Range]:
    monkeypatch.setattr(stand_ins, "BLOCK", 10)
    monkeypatch.setattr(stand_ins, "KEPT", 3)
    return []


def standing_in(asked: list[Range], size: int = len(CONTENT)) -> FolderStandIn:
    def read(ranges: Sequence[Range]) -> list[bytes]:
        asked.extend(ranges)
        return [CONTENT[start:end] for _, start, end in ranges]

    return FolderStandIn("there://it", read, {"f": size})


def filled(stand_in: FolderStandIn, start: int, end: int) -> bytes:
    room = bytearray(end - start)
    stand_in.fill("f", memoryview(room), start)
    return bytes(room)


@pytest.mark.parametrize("size", [97, 100])
@pytest.mark.parametrize("step", [1, 7, 10, 23])
def test_who_reads_on_asks_for_each_block_once(asked: list[Range], step: int, size: int) -> None:
    stand_in = standing_in(asked, size)
    places = range(0, size, step)
    found = [filled(stand_in, place, min(place + step, size)) for place in places]
    assert b"".join(found) == CONTENT[:size]
    assert asked == [("f", start, min(start + 10, size)) for start in range(0, size, 10)]


def test_two_who_read_at_two_places_do_not_take_blocks_from_each_other(asked: list[Range]) -> None:
    stand_in = standing_in(asked)
    for place in range(0, 40, 4):
        for first in (0, 50):
            assert (
                filled(stand_in, first + place, first + place + 4) == CONTENT[first + place :][:4]
            )
    assert len(asked) == len(set(asked)) == 8


def test_a_block_whose_end_was_not_read_is_kept_until_others_are_read(asked: list[Range]) -> None:
    stand_in = standing_in(asked)
    for place in (0, 20, 40, 0):
        filled(stand_in, place, place + 5)
    assert len(asked) == 3
    for place in (60, 0, 20):
        filled(stand_in, place, place + 5)
    assert asked[3:] == [("f", 60, 70), ("f", 20, 30)]


def test_a_file_that_has_become_shorter_is_noticed(asked: list[Range]) -> None:
    with pytest.raises(EOFError, match="there://it/f"):
        filled(standing_in(asked, 50), 45, 55)
