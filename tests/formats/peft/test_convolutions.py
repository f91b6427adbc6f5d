"""Convolutions: an adapter is read as the function that peft runs, or refused.

peft's A has the kernel, stride and padding of the convolution it adapts, and nothing else of it:
it is never dilated, never in groups, and padded with zeros. Where the convolution itself is
otherwise, B A as a kernel, which peft merges, is not what was trained.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

import peftsurgery as ps
from peftsurgery.errors import SurgeryError
from tests.parity.models import randomise

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

# What differs from peft's A, and how the refusal says it.
UNLIKE: dict[str, tuple[dict[str, Any], str]] = {
    "dilated": ({"dilation": 2, "padding": "same"}, "with a dilation of \\(2, 2\\)"),
    "dilated in one dimension": ({"dilation": (1, 2)}, "with a dilation of \\(1, 2\\)"),
    "circular": ({"padding": 1, "padding_mode": "circular"}, "padded in circular mode"),
    "reflect": ({"padding": (0, 1), "padding_mode": "reflect"}, "padded in reflect mode"),
    "replicate": ({"padding": "same", "padding_mode": "replicate"}, "padded in replicate mode"),
    "in groups": ({"groups": 2}, "in 2 groups"),
}

# What changes nothing: a dilation of single taps, another way to pad by nothing.
ALIKE: dict[str, dict[str, Any]] = {
    "strided and padded": {"stride": (2, 1), "padding": (1, 2)},
    "padded to the same size": {"padding": "same"},
    "dilated single taps": {"kernel_size": 1, "dilation": 3},
    "dilated where there is one tap": {"kernel_size": (3, 1), "dilation": (1, 4)},
    "circular by nothing": {"padding_mode": "circular"},
    "single taps of the same size": {
        "kernel_size": 1,
        "padding": "same",
        "padding_mode": "reflect",
    },
}


class Convolution(nn.Module):
    """One convolution and what reads it."""

    def __init__(self, kind: type[nn.Module] = nn.Conv2d, **settings: Any) -> None:
        super().__init__()
        self.mix = kind(4, 6, **{"kernel_size": 3, **settings})

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.mix(x).tanh()
        return result


def made(settings: dict[str, Any]) -> tuple[nn.Module, Tensor, Any]:
    """A model, images for it, and the model as peft adapts it, with values that show."""
    torch.manual_seed(0)
    module = Convolution(**settings).eval()
    theirs = get_peft_model(deepcopy(module), LoraConfig(r=2, target_modules=["mix"])).eval()
    randomise(theirs, lambda name: "lora_" in name, 0.3)
    return module, torch.randn(2, 4, 9, 8), theirs


@pytest.mark.parametrize("case", UNLIKE)
def test_a_convolution_that_pefts_a_is_unlike_is_refused_both_ways(
    case: str, tmp_path: Path
) -> None:
    settings, why = UNLIKE[case]
    module, images, theirs = made(settings)
    theirs.save_pretrained(tmp_path / "theirs")
    graph = ps.capture(module, (images,))
    with pytest.raises(SurgeryError, match=f"PSG507: 'mix' is a convolution {why}"):
        ps.from_peft(graph, tmp_path / "theirs")
    with pytest.raises(SurgeryError, match=f"PSG510: 'mix' is a convolution {why}"):
        ps.to_peft(ps.apply(graph, "lora_conv", rank=2), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("case", UNLIKE)
def test_what_is_applied_here_is_the_kernel_it_folds_to(case: str) -> None:
    """The rule's own branch has everything of its convolution: plain torch with W + s B A."""
    module, images, _ = made(UNLIKE[case][0])
    ours = ps.apply(ps.capture(module, (images,)), "lora_conv", rank=2, alpha=3).eval()
    randomise(ours, lambda name: "lora_conv" in name, 0.3)
    plain: Any = deepcopy(module)
    groups = plain.mix.groups
    a, b = (ours.get_parameter(f"mix.lora_conv.{name}").detach() for name in "AB")
    mixed = [
        torch.einsum("or,rihw->oihw", rows.flatten(1), kernels)
        for rows, kernels in zip(b.chunk(groups), a.chunk(groups), strict=True)
    ]
    plain.mix.weight.data += 1.5 * torch.cat(mixed)
    torch.testing.assert_close(ours(images), plain(images), rtol=0, atol=2e-6)
    torch.testing.assert_close(ps.fold(ours)(images), plain(images), rtol=0, atol=2e-6)


@pytest.mark.parametrize("case", ALIKE)
def test_what_makes_no_difference_to_pefts_a_is_honoured_both_ways(
    case: str, tmp_path: Path
) -> None:
    module, images, theirs = made(ALIKE[case])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ps.from_peft(ps.capture(module, (images,)), tmp_path / "theirs").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-6)
        # peft's own sum of two products is up to 9e-7 from it on some processors
        exact = deepcopy(theirs).double()(images.double())
        found = ps.fold(ours)(images).double()
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)
        ps.to_peft(ours, tmp_path / "ours")
        again = PeftModel.from_pretrained(deepcopy(module), tmp_path / "ours").eval()
        assert torch.equal(again(images), theirs(images))


METHODS: dict[str, Any] = {
    "DoRA": LoraConfig(r=2, lora_alpha=3, use_dora=True),
    "LoHa": LoHaConfig(r=2, alpha=3),
    "LoKr": LoKrConfig(r=1, alpha=3, decompose_factor=2),
    "LoKr of whole matrices": LoKrConfig(r=8, alpha=3),
}


@pytest.mark.parametrize("settings", [{"stride": (2, 1), "padding": (1, 2)}, {"kernel_size": 1}])
@pytest.mark.parametrize("method", METHODS)
def test_other_methods_of_convolutions_are_read_folded_and_written(
    method: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module = Convolution(**settings).eval()
    config = replace(METHODS[method], target_modules=["mix"])
    theirs = get_peft_model(deepcopy(module), config).eval()
    randomise(theirs, lambda name: any(part in name for part in ("lora_", "hada_", "lokr_")), 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    images = torch.randn(2, 4, 9, 8)
    ours = ps.from_peft(ps.capture(module, (images,)), tmp_path / "theirs").eval()
    with torch.no_grad():
        exact = deepcopy(theirs).double()(images.double())
        assert not torch.allclose(exact, module.double()(images.double()), atol=1e-2)
        module.float()
        for model in (ours, ps.fold(ours)):
            torch.testing.assert_close(model(images).double(), exact, rtol=0, atol=2e-6)
        ps.to_peft(ours, tmp_path / "ours")
        again = PeftModel.from_pretrained(deepcopy(module), tmp_path / "ours").eval()
        assert torch.equal(again(images), theirs(images))


@pytest.mark.parametrize(("kind", "dims"), [(nn.Conv1d, 1), (nn.Conv3d, 3)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_convolutions_in_other_dimensions_are_refused_by_name(
    kind: type[nn.Module], dims: int, dilation: int, tmp_path: Path
) -> None:
    module = Convolution(kind, dilation=dilation, padding="same").eval()
    theirs = get_peft_model(deepcopy(module), LoraConfig(r=2, target_modules=["mix"]))
    theirs.save_pretrained(tmp_path)
    graph = ps.capture(module, (torch.randn(2, 4, *(6,) * dims),))
    with pytest.raises(SurgeryError, match=r"PSG507: .*'?mix"):
        ps.from_peft(graph, tmp_path)


def test_the_difference_that_is_refused_is_real() -> None:
    """What peft runs is not what it merges, for a dilated and for a circular convolution."""
    for case in ("dilated", "circular"):
        module, images, theirs = made(UNLIKE[case][0])
        with torch.no_grad():
            runs = theirs(images)
            merged = theirs.merge_and_unload()(images)
        assert (runs - merged).abs().max() > 0.05
        assert not F.mse_loss(runs, module(images)).isclose(torch.tensor(0.0))
