"""Draws of Python and numpy are refused if they matter, whatever was drawn before."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.capture.randomness import kept_generators, starts
from tests.capture.pairs import assert_same, pair_of


def test_generators_start_with_extremes_and_end_every_kind_of_draw() -> None:
    before = random.getstate(), repr(np.random.get_state())
    least, most, *others = starts()
    for start, number in ((least, 0.0), (most, 1 - 2**-53)):
        with kept_generators(start):
            assert (random.random(), np.random.random_sample()) == (number, number)
    for start in (least, most, *others):
        with kept_generators(start):
            drawn = [random.gauss(0, 1), random.normalvariate(0, 1), random.randrange(5)]
            drawn += [*np.random.randn(3), *np.random.permutation(5), np.random.randint(0, 5)]
            assert np.isfinite(drawn).all()
    assert (random.getstate(), repr(np.random.get_state())) == before


class Drawing(nn.Module):
    """Draws in training."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.into(x)
        return self.drawn(y) if self.training else y

    def drawn(self, y: Tensor) -> Tensor:
        return y * 0 if random.random() < 0.01 else y


class Seldom(Drawing):
    def drawn(self, y: Tensor) -> Tensor:
        return y if np.random.uniform(0, 1) < 0.999 else y + 1


class Permuted(Drawing):
    def drawn(self, y: Tensor) -> Tensor:
        return y[:, torch.as_tensor(np.random.permutation(4))]


class Scattered(Drawing):
    def drawn(self, y: Tensor) -> Tensor:
        return y * random.gauss(0, 1)


class Never(Drawing):
    def drawn(self, y: Tensor) -> Tensor:
        return y * 0 if random.uniform(0, 1) < 0 else y


class Seeded(Drawing):
    def drawn(self, y: Tensor) -> Tensor:
        np.random.seed(3)
        return y[:, torch.as_tensor(np.random.permutation(4))]


@pytest.mark.parametrize("kind", [Drawing, Seldom, Permuted, Scattered], ids=lambda k: k.__name__)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_draw_that_matters_is_refused_whatever_was_drawn_before(kind: Any, seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    with pytest.raises(ps.SurgeryError) as caught:
        ps.capture(kind().train(), {"x": torch.randn(3, 4)}).train()(torch.randn(5, 4))
    assert caught.value.code == "PSG211"


@pytest.mark.parametrize("kind", [Never, Seeded], ids=lambda k: k.__name__)
def test_a_draw_that_does_not_matter_is_none(kind: Any) -> None:
    both = pair_of(kind().train(), {"x": torch.randn(3, 4)})
    assert_same(*both.run(torch.randn(5, 4)))
