"""Captures and calls leave the user's model bit for bit as it was, or are refused."""

from __future__ import annotations

import copy
import random
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.capture import capture
from tests.capture.pairs import Pair, assert_same, pair_of
from tests.models.captured import UNCHANGED, captured
from tests.models.state import state_of
from tests.models.zoo import ZOO, hf, ids


@pytest.mark.parametrize("name", ZOO)
def test_a_model_is_bit_identical_after_captures_and_calls_in_both_modes(name: str) -> None:
    graph = copy.deepcopy(captured(name))
    module = graph.source.module
    assert name in UNCHANGED  # by its capture
    before = state_of(module)
    for mode in (False, True):
        graph.train(mode)(**ZOO[name].inputs(2, 6))
    assert state_of(module) == before


def test_a_capture_draws_no_random_numbers() -> None:
    module = ZOO["bert"].build()
    before = random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()
    capture(module)
    after = random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()
    assert after == before


def test_a_model_with_labels_is_bit_identical_too() -> None:
    module = ZOO["llama"].build()
    graph = capture(module)
    before, tokens = state_of(module), ids(2, 6)
    graph.train()(input_ids=tokens, labels=tokens).loss.backward()
    assert state_of(module) == before


class _Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(4, 4)
        self.calls, self.longest, self.table = 0, 0, torch.zeros(4)
        self.last: Tensor | None = None


class Writing(_Linear):
    """Changes a weight, through a view."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.into.weight.view(-1)[2:4].mul_(0.5)
        return self.into(x)


class Summing(_Linear):
    """Keeps a sum in a tensor that is no buffer."""

    def forward(self, x: Tensor) -> Tensor:
        self.table += x.detach().mean(0)
        return self.into(x) + self.table


class Averaging(_Linear):
    """Puts a new tensor in the place of the one it had."""

    def forward(self, x: Tensor) -> Tensor:
        self.table = 0.5 * self.table + x.detach().mean(0)
        return self.into(x) + self.table


class Counting(_Linear):
    """Counts its calls in a number."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.into(x) * self.calls


class Alternating(_Linear):
    """Takes another weight in every other call."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.turn = nn.Linear(4, 4), False

    def forward(self, x: Tensor) -> Tensor:
        self.turn = not self.turn
        return x @ (self.into.weight if self.turn else self.other.weight)


class Collecting(_Linear):
    """Counts its calls by what it puts in a list, within another container."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, tuple[list[int], ...]] = {"of": ([], [])}

    def forward(self, x: Tensor) -> Tensor:
        self.found["of"][1].append(1)
        return self.into(x) * len(self.found["of"][1])


CHANGING = [Writing, Summing, Averaging, Counting, Alternating, Collecting]


@pytest.mark.parametrize("kind", CHANGING, ids=lambda k: k.__name__)
def test_a_forward_that_changes_its_model_is_refused_and_nothing_is_changed(
    kind: type[nn.Module],
) -> None:
    module = kind()
    before = state_of(module)
    with pytest.raises(ps.SurgeryError) as caught:
        capture(module, {"x": torch.randn(2, 4)})
    assert caught.value.code == "PSG217"
    assert state_of(module) == before


class Noting(_Linear):
    """Notes what nothing depends on, makes a table once, and a buffer when it is first needed."""

    def forward(self, x: Tensor) -> Tensor:
        self.longest = max(self.longest, 5)
        if self.last is None:
            self.last = torch.arange(4, device=x.device)
        if not hasattr(self, "lazy"):
            self.register_buffer("lazy", torch.ones(4))
        return self.into(x) + self.last + self.get_buffer("lazy")


def test_notes_and_tables_of_a_forward_are_not_kept_and_not_refused() -> None:
    module = Noting()
    before = state_of(module)
    graph = capture(module, {"x": torch.randn(2, 4)})
    assert state_of(module) == before
    assert_same(*Pair(module, graph).run(torch.randn(5, 4)))


@pytest.mark.slow
def test_a_model_that_rescales_its_weights_once_is_captured_once_it_has() -> None:
    torch.manual_seed(0)
    settings = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "rescale_every": 1}
    module = hf("RwkvForCausalLM", "RwkvConfig", **settings, context_length=16, use_cache=False)()
    module.eval()
    before, tokens = state_of(module), ids(2, 6)
    with pytest.raises(ps.SurgeryError) as caught:
        capture(module, {"input_ids": tokens})
    assert caught.value.code == "PSG217"
    assert state_of(module) == before


class Keeping(_Linear):
    """Keeps what it computed, in containers within containers, and never looks at it."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Any] = {"all": [], "last": ({"of": deque([0, 1], 2)},)}

    def forward(self, x: Tensor) -> Tensor:
        y = self.into(x)
        self.kept["all"].append(y)
        self.kept["last"][0]["of"].append(y)
        self.kept["last"][0]["new"] = y
        return y


def test_what_a_forward_puts_in_containers_is_not_kept_at_any_depth() -> None:
    module = Keeping()
    both = pair_of(module, {"x": torch.randn(2, 4)})
    assert module.kept["all"] == []
    assert module.kept["last"] == ({"of": deque([0, 1])},)
    x = torch.randn(5, 4)
    assert_same(module(x), both.graph(x))


class Hooked(_Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.into(x)


def test_hooks_and_a_forward_of_its_own_are_there_after_a_capture() -> None:
    module = Hooked()
    module.into.register_forward_hook(lambda part, args, out: out * 2)
    original = module.forward
    module.forward = lambda x: original(x) + 1
    before = state_of(module)
    both = pair_of(module, {"x": torch.randn(2, 4)})
    assert state_of(module) == before
    x = torch.randn(3, 4)
    assert_same(module(x), both.graph(x))
