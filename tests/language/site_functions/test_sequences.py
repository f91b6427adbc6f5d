"""Functions of sequences of tokens, against the same done with Python's lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftsurgery.language.site_functions import sequences

PLACES = st.lists(st.integers(-5, 5), max_size=4)


def inserted(text: list[int], new: list[int], places: list[int]) -> list[int]:
    """The text with each new token before the token that its place names; ties in their order."""
    spots = [place if place >= 0 else place + len(text) for place in places]
    waiting = sorted(zip(spots, new, strict=True), key=lambda pair: pair[0])
    made: list[int] = []
    for number, token in enumerate(text):
        while waiting and waiting[0][0] <= number:
            made.append(waiting.pop(0)[1])
        made.append(token)
    return made + [token for _, token in waiting]


@settings(max_examples=100, deadline=None)
@given(PLACES, st.integers(2, 6))
def test_tokens_are_moved_where_a_list_would_have_them(places: list[int], length: int) -> None:
    text, new = list(range(10, 10 + length)), list(range(len(places)))
    found = sequences.arrange(torch.tensor([new + text]), places)
    assert found[0].tolist() == inserted(text, new, places)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=3, unique=True), st.integers(5, 7))
def test_positions_count_on_over_new_tokens(places: list[int], length: int) -> None:
    """A text whose positions count from 0 has positions that count from 0 with more tokens in."""
    positions = torch.arange(length)[None]
    found = sequences.shift(positions, len(places), places)
    assert found.tolist() == [list(range(length + len(places)))]


def test_positions_of_padding_on_the_left_stay() -> None:
    """As models count them from a mask: two of padding, then 0, 1, 2."""
    positions = torch.tensor([[1, 1, 0, 1, 2]])
    assert sequences.shift(positions, 2, [3, 3]).tolist() == [[1, 1, 0, 1, 2, 3, 4]]
    assert sequences.shift(positions, 1, [2]).tolist() == [[1, 1, 0, 1, 2, 3]]


def test_what_is_not_given_stays_so() -> None:
    assert sequences.extend(None, 3) is None
    assert sequences.arrange(None, [1]) is None
    assert sequences.shift(None, 3) is None
    assert sequences.repeat(None, 2) is None


@pytest.mark.parametrize("value", [0, 1, -100])
def test_more_on_the_left(value: int) -> None:
    x = torch.tensor([[5, 6], [7, 8]])
    assert sequences.extend(x, 3, value).tolist() == [
        [value, value, value, 5, 6],
        [value, value, value, 7, 8],
    ]


def test_prompts_serve_equal_shares_of_a_batch_and_their_votes_are_counted() -> None:
    prompts, texts = torch.tensor([[[1.0]], [[2.0]]]), torch.zeros(4, 1, 1)
    assert sequences.concat(prompts, texts)[:, 0, 0].tolist() == [1, 1, 2, 2]
    batch = torch.arange(3)[:, None]
    assert torch.equal(sequences.split(sequences.repeat(batch, 2), 2), torch.stack([batch] * 2))
    logits = torch.tensor([[[0.0, 1.0]], [[3.0, 2.0]], [[5.0, 9.0]]])
    torch.testing.assert_close(sequences.votes(logits), torch.tensor([[1 / 3, 2 / 3]]))
