"""Adapters of convolutions that are linears, read from peft and written for it: to peft's outputs.

Peft runs in this process, on a copy of the same model.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import peftsurgery as ps
from peftsurgery.errors import SurgeryError
from tests.anatomy.test_pointwise import SHAPES, captured
from tests.parity.models import randomise

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rank", [1, 2])
def test_what_is_written_is_what_peft_computes(rank: int, fused: bool, tmp_path: Path) -> None:
    model, graph = captured(rank, fused)
    operated = ps.apply(graph, "lora_attention", rank=2, alpha=6)
    for name in operated.report.added:
        nn.init.normal_(operated.get_parameter(name))
    ps.to_peft(operated, tmp_path)
    # in double precision: in single, peft's own rounding errors are larger than what is asked here
    x = torch.randn(3, 3, *SHAPES[rank]).double()
    theirs: Any = PeftModel.from_pretrained(deepcopy(model), tmp_path).double().eval()
    again = ps.from_peft(graph, tmp_path).double()
    folded = ps.fold(operated.double())
    with torch.no_grad():
        torch.testing.assert_close(operated(x), theirs(x), rtol=1e-12, atol=1e-10)
        torch.testing.assert_close(again(x), theirs(x), rtol=1e-12, atol=1e-10)
        torch.testing.assert_close(folded(x), theirs.merge_and_unload()(x), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("rank", [1, 2])
def test_what_peft_made_is_read(rank: int, tmp_path: Path) -> None:
    model, graph = captured(rank, fused=False)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["one", "three"])
    theirs: Any = get_peft_model(deepcopy(model), config).eval()
    randomise(theirs, lambda name: "lora" in name)
    theirs.save_pretrained(tmp_path)
    operated = ps.from_peft(graph, tmp_path)
    assert [match["module"] for match in operated.report.matches] == ["one", "three"]
    x = torch.randn(3, 3, *SHAPES[rank])
    with torch.no_grad():
        torch.testing.assert_close(operated(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_what_has_other_shapes_in_peft_is_not_written(tmp_path: Path) -> None:
    _, graph = captured(2, fused=False)
    operated = ps.apply(graph, "dora", where={"role": ["attn.q"]})
    with pytest.raises(SurgeryError, match=r"PSG510.*'one' is a convolution"):
        ps.to_peft(operated, tmp_path / "out")
    assert not (tmp_path / "out").exists()
