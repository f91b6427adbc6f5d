"""Tensors that hold several parameters, against slices taken by hand."""

from __future__ import annotations

import pytest
import torch

from peftsurgery.errors import SurgeryError
from peftsurgery.formats.joined_tensors import JoinedTensor, values_of

LENGTH, HEADS, WIDTH = 3, 2, 4
SHAPE = (LENGTH, HEADS, WIDTH)


@pytest.mark.parametrize("flat", [0, 1])
def test_parts_of_tokens_lie_side_by_side_and_gaps_are_zero(flat: int) -> None:
    values = {name: torch.randn(SHAPE) for name in "abd"}
    joined = JoinedTensor(dict.fromkeys("abd", SHAPE), ["a", "b", None, "d"], flat)
    whole = joined.join(values)
    assert tuple(whole.shape) == joined.shape
    assert len(whole.shape) == flat + 1
    lying = whole.view(LENGTH, 4, HEADS * WIDTH)
    for position, name in ((0, "a"), (1, "b"), (3, "d")):
        assert torch.equal(lying[:, position], values[name].flatten(1))
    assert not lying[:, 2].any()
    again = joined.split("key", whole)
    assert again.keys() == values.keys()
    assert all(torch.equal(again[name], value) for name, value in values.items())


def test_parts_of_a_fused_weight_lie_one_below_the_other() -> None:
    values = {"q": torch.randn(2, 5), "v": torch.randn(3, 5)}
    joined = JoinedTensor({"q": (2, 5), "v": (3, 5)}, ["q", "v"])
    whole = joined.join(values)
    assert torch.equal(whole[:2], values["q"])
    assert torch.equal(whole[2:], values["v"])
    assert torch.equal(joined.split("key", whole)["v"], values["v"])


def test_every_tensor_is_taken_and_every_one_asked_for_is_there() -> None:
    wanted = {"one": JoinedTensor({"a": (2,)}, ["a"]), "two": JoinedTensor({"b": (2,)}, ["b"])}
    one, two = torch.ones(2), torch.zeros(2)
    assert values_of(wanted, {"one": one, "two": two}) == {"a": one, "b": two}
    with pytest.raises(SurgeryError, match=r"PSG507: .*'two', which is not there"):
        values_of(wanted, {"one": one})
    with pytest.raises(SurgeryError, match=r"PSG506: .*'too' has no place"):
        values_of(wanted, {"one": one, "two": two, "too": one})
    with pytest.raises(SurgeryError, match=r"PSG507: 'one' has shape \[3\]"):
        values_of(wanted, {"one": torch.ones(3), "two": two})
