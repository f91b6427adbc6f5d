"""What a capture returns is what transformers makes of the same values."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast
from transformers.utils import ModelOutput

from peftsurgery.capture.returned import builder

X, Y = torch.ones(2), torch.zeros(3)


@dataclass
class Checking(ModelOutput):
    """An output that does more than others when it is made."""

    first: Any = None
    second: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.second = self.first


@pytest.mark.parametrize(
    "output",
    [
        CausalLMOutputWithPast(logits=X),
        CausalLMOutputWithPast(loss=X, logits=Y),
        CausalLMOutputWithPast(logits=X, hidden_states=(X, Y)),
        BaseModelOutput(last_hidden_state=X),
        Checking(first=X),
        (X, Y),
        {"a": X, "b": [Y]},
        X,
    ],
    ids=lambda value: type(value).__name__,
)
def test_is_made_as_the_originals(output: Any) -> None:
    leaves, spec = pytree.tree_flatten(output)
    made, expected = builder(spec)(leaves), pytree.tree_unflatten(leaves, spec)
    assert type(made) is type(expected)
    assert repr(made) == repr(expected)
    if isinstance(expected, ModelOutput):
        assert list(made.items()) == list(expected.items())
        assert list(vars(made)) == list(vars(expected))
        assert vars(made) == vars(expected)
        assert pickle.loads(pickle.dumps(made)).keys() == expected.keys()
        assert copy.deepcopy(made).keys() == expected.keys()
        made["logits" if "logits" in made else next(iter(made))] = Y
        assert made[0].shape == expected[0].shape or made[0] is Y


def test_a_first_field_may_hold_all_of_them() -> None:
    output = BaseModelOutput(last_hidden_state=X)
    _, spec = pytree.tree_flatten(output)
    made = builder(spec)([5])
    assert made.last_hidden_state == 5
    assert list(made) == ["last_hidden_state"]
