"""What the demonstration learns from, and that it is not what it is judged by."""

import re

import pytest

from tools.story.docstrings import PACKAGES, collect


@pytest.mark.slow
def test_held_out_docstrings_are_not_learnt_from_and_do_not_name_their_package() -> None:
    learn, judge = collect(train=12, held_out=6)
    assert {label for _, label in judge} == set(range(len(PACKAGES)))
    assert len(learn) == 12 * len(PACKAGES)
    assert not {text for text, _ in learn} & {text for text, _ in judge}
    for text, label in learn + judge:
        assert re.search(PACKAGES[label], text, re.IGNORECASE) is None


def test_the_same_seed_gives_the_same_texts() -> None:
    assert collect(train=4, held_out=2) == collect(train=4, held_out=2)
