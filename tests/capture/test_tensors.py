"""What is traced in a model's place has its structure, and nothing of the model itself."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from peftsurgery.capture.tensors import named_tensors, tensor_infos, traceable
from tests.models.zoo import ZOO, entry


def test_a_copy_to_be_traced_has_tables_of_its_own() -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    module[0].register_forward_hook(lambda part, args, output: output)
    copied = traceable(module, {})
    pairs = list(zip(module.modules(), copied.modules(), strict=True))
    assert [type(part) for _, part in pairs] == [type(part) for part, _ in pairs]
    for part, other in pairs:
        tables = {key: table for key, table in vars(part).items() if isinstance(table, dict)}
        assert list(tables) == [k for k, v in vars(other).items() if isinstance(v, dict)]
        for key, table in tables.items():
            theirs = vars(other)[key]
            assert theirs is not table
            assert (type(theirs), list(theirs)) == (type(table), list(table))
    assert tensor_infos(copied) == tensor_infos(module)
    assert not any(tensor.is_meta for tensor in copied.state_dict().values())
    copied[1].register_forward_hook(lambda part, args, output: output)
    assert module[1]._forward_hooks == OrderedDict()


class Renaming(nn.Linear):
    """Has a name of its own for its weight."""

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Any]]:
        yield "own", self.weight


@pytest.mark.parametrize("name", [*ZOO, "renaming"])
def test_the_tensors_are_those_that_torch_names(name: str) -> None:
    module = Renaming(1, 2) if name == "renaming" else entry(name).make()
    named = (module.named_parameters, module.named_buffers)
    expected = [item for each in named for item in each(remove_duplicate=False)]
    found = named_tensors(module)
    assert [name for name, _ in found] == [name for name, _ in expected]
    assert all(a is b for (_, a), (_, b) in zip(found, expected, strict=True))
