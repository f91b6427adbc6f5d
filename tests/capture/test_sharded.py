"""Sharded parameters in a group of one process: the same numbers, and what is refused by code."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from peftsurgery.capture.sharded import check_whole, is_sharded, sharded_like, whole
from peftsurgery.errors import SurgeryError
from tests.capture.pairs import assert_same, pair
from tests.models.zoo import ZOO


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """This process is a group by itself."""
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_parts_that_are_no_blocks_are_sharded_too() -> None:
    both = pair("llama")
    paths = ("model.embed_tokens", "model.layers.0.mlp", "model.layers.0", "model.norm", "lm_head")
    for path in paths:
        fully_shard(both.graph.get_submodule(path))
    fully_shard(both.graph)
    with torch.no_grad():
        assert_same(*both.run(**ZOO["llama"].inputs(2, 5)))
    with pytest.raises(SurgeryError) as raised:
        check_whole(both.graph)
    assert raised.value.code == "PSG225"


def test_a_whole_value_becomes_a_part_and_whole_again() -> None:
    graph = pair("functional").graph
    before = {name: value.detach().clone() for name, value in graph.named_parameters()}
    fully_shard(graph)
    for name, value in graph.named_parameters():
        assert is_sharded(value)
        assert torch.equal(whole(value), before[name])
        part = sharded_like(before[name], value)
        assert is_sharded(part)
        assert torch.equal(whole(part), before[name])
    assert sharded_like(before[name], before[name]) is before[name]


def test_a_plan_of_tensor_parallelism_is_refused_by_code() -> None:
    both = pair("llama")
    path = "model.layers.1.mlp.up_proj"
    plan = {f"{path}.weight": "colwise", path: "colwise"}
    apply_tensor_parallelism(both.graph, init_device_mesh("cpu", (1,)), plan)
    with pytest.raises(SurgeryError, match=path) as raised:
        both.graph(**ZOO["llama"].inputs(2, 5))
    assert raised.value.code == "PSG226"
