"""While a model is traced, transformers' patches of what is imported are in place, no others."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.exporters import utils
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router
from transformers.utils.import_utils import is_torchdynamo_exporting

import peftsurgery as ps
from peftsurgery.capture.patches import MODELS, patched


def registered() -> list[tuple[str, str]]:
    return [(path, name) for path, name, _ in utils._PATCHES["dynamo"]]


def test_patches_of_imported_modules_are_in_place_and_taken_out_again() -> None:
    def found() -> list[Any]:
        here = [(path, name) for path, name in registered() if not path.startswith(MODELS)]
        objects = [(utils.import_dotted_path(path, True), name) for path, name in here]
        every = [getattr(owner, name) for owner, name in objects if owner is not None]
        return [*every, NllbMoeTop2Router._cast_classifier, F.scaled_dot_product_attention]

    before, find = found(), utils.import_dotted_path
    with patched(nn.Identity()):
        assert utils.import_dotted_path is find
        within = found()
    assert found() == before
    assert len(within) > 2
    assert all(one is not other for one, other in zip(before, within, strict=True))


def test_no_architecture_is_imported_to_be_patched() -> None:
    modules = {".".join(path.split(".")[:4]) for path, _ in registered() if path.startswith(MODELS)}
    missing = {module for module in modules if module not in sys.modules}
    with patched(nn.Identity()):
        pass
    assert missing == {module for module in modules if module not in sys.modules}
    assert all(module.rpartition(".")[2].startswith("modeling_") for module in modules)


class Asking(PreTrainedModel):
    """A model that solves a system by steps when it is exported, and at once when it is called."""

    config_class = PreTrainedConfig
    main_input_name = "x"

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.mix = nn.Linear(4, 16)
        self.post_init()

    def forward(self, x: Tensor) -> Tensor:
        system = self.mix(x).unflatten(-1, (4, 4)).tril(-1)
        if is_torchdynamo_exporting():
            powers = [torch.linalg.matrix_power(-system, n) for n in range(4)]
            return sum(powers, torch.zeros(())) @ x[..., None]
        return torch.linalg.solve_triangular(system, x[..., None], upper=False, unitriangular=True)


def test_a_model_computes_as_when_it_is_called() -> None:
    torch.manual_seed(0)
    model, x = Asking(PreTrainedConfig()).eval(), torch.randn(3, 5, 4)
    captured = ps.capture(model, inputs={"x": x[:2]})
    assert "solve_triangular" in str(captured.base_capture.top.graph)
    with torch.no_grad():
        assert torch.equal(captured(x), model(x))
