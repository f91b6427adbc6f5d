"""What is traced in a model's place has its structure, and nothing of the model itself."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from peftsurgery.capture.tensors import tensor_infos, traceable


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
