"""What config.json says of a module's weight, read as compressed-tensors reads it, or refused."""

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

from peftsurgery.checkpoint.codecs.schemes import refused, scheme_of
from peftsurgery.errors import SurgeryError

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor"}


def said_of(*groups: dict[str, Any], **more: Any) -> dict[str, Any]:
    named = {f"group_{n}": group for n, group in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "config_groups": named, **more}


def group(weights: dict[str, Any], *targets: str, name: str = "pack-quantized") -> dict[str, Any]:
    return {"targets": list(targets or ("Linear",)), "weights": weights, "format": name}


@pytest.mark.parametrize(
    "weights",
    [
        {},
        {"num_bits": 4, "group_size": 32},
        {"num_bits": 4, "group_size": -1},
        {"strategy": "CHANNEL", "type": "INT"},
        {**INT4, "symmetric": False, "actorder": "static"},
    ],
)
def test_what_is_left_out_is_what_the_package_takes(weights: dict[str, Any]) -> None:
    said = said_of(group(weights))
    theirs = QuantizationConfig(**said).config_groups["group_0"].weights
    mine = scheme_of("m", said)
    assert (mine.bits, mine.kind, mine.strategy) == (theirs.num_bits, theirs.type, theirs.strategy)
    assert (mine.symmetric, mine.ordered) == (theirs.symmetric, False)
    assert mine.group == max(theirs.group_size or 0, 0)


@pytest.mark.parametrize(
    "targets",
    [
        (["Linear"], ["re:.*down"]),
        (["re:.*"], ["b.down"]),
        (["re:b.*"], ["re:a.*"]),
        (["re:.*down"], ["Linear"]),
        (["re:.*wn$", "a.up"], ["re:.*o.*", "Linear"]),
        (["a.up", "a.down"], ["re:b\\."]),
    ],
)
def test_a_module_has_the_group_that_the_package_gives_it(targets: tuple[list[str], ...]) -> None:
    model = torch.nn.ModuleDict(
        {
            name: torch.nn.ModuleDict(
                {"up": torch.nn.Linear(32, 32), "down": torch.nn.Linear(32, 32)}
            )
            for name in "ab"
        }
    )
    said = said_of(*(group(w, *t) for w, t in zip((INT4, INT8), targets, strict=True)))
    apply_quantization_config(model, QuantizationConfig(**said, quantization_status="compressed"))
    count = 0
    for name, module in model.named_modules():
        if hasattr(module, "quantization_scheme"):
            assert scheme_of(name, said).bits == module.quantization_scheme.weights.num_bits
            count += 1
    assert count == 4


def test_of_groups_for_classes_a_module_has_the_one_that_they_agree_on() -> None:
    alike = said_of(group(INT4, "Linear"), group({**INT4}, "Embedding"))
    assert scheme_of("m", alike).bits == 4
    with pytest.raises(ValueError, match="several config groups"):
        scheme_of("m", said_of(group(INT4, "Linear"), group(INT8, "Embedding")))
    with pytest.raises(ValueError, match="no config group"):
        scheme_of("m", said_of(group(INT4, "a"), group(INT8, "b")))
    assert scheme_of("m", said_of(group(INT8, "model.m"))).bits == 8  # there is no other
    attention: dict[str, Any] = {"targets": ["LlamaAttention"], "weights": None}
    assert scheme_of("m", said_of(group(INT8, "Linear"), attention)).bits == 8


def test_a_group_has_a_format_of_its_own() -> None:
    said = said_of(
        group(INT4, "re:a"), group(FP8, "re:b", name="float-quantized"), format="mixed-precision"
    )
    assert refused(said) is None
    assert [scheme_of(name, said).format for name in "ab"] == ["pack-quantized", "float-quantized"]


@pytest.mark.parametrize(
    ("weights", "name", "why"),
    [
        ({"num_bits": 3}, "pack-quantized", "int of 3 bits.*2, 4, 8"),
        ({"num_bits": 16}, "int-quantized", "int of 16 bits"),
        ({"num_bits": 4, "type": "float"}, "float-quantized", "float of 4 bits"),
        ({"num_bits": 8, "type": "float"}, "pack-quantized", "float of 8 bits"),
        ({**INT8, "strategy": "token"}, "int-quantized", "strategy 'token'"),
        ({**INT8, "strategy": "block", "block_structure": [2, 2]}, "int-quantized", "'block'"),
        ({**INT8, "strategy": "hexagon"}, "int-quantized", "strategy 'hexagon'"),
        ({**INT4, "group_size": None}, "pack-quantized", "without a group_size"),
        ({**INT4, "group_size": "8"}, "pack-quantized", "group_size is no whole"),
        ({**INT4, "num_bits": None}, "pack-quantized", "num_bits is no whole"),
        ({**INT4, "symmetric": "false"}, "pack-quantized", "symmetric is neither"),
        ({**FP8, "symmetric": False}, "float-quantized", "not symmetric"),
        ({**FP8, "strategy": "block"}, "float-quantized", "block_structure"),
        (
            {**FP8, "strategy": "block", "block_structure": [0, 4]},
            "float-quantized",
            "block_structure",
        ),
        ({**FP8, "actorder": "group"}, "float-quantized", "order of a calibration"),
        ({**FP8, "num_bits": 4}, "nvfp4-pack-quantized", "strategy 'tensor'.*tensor_group"),
        (FP8, "mxfp8-quantized", "the format 'mxfp8-quantized'"),
        (None, "pack-quantized", "no config group"),
    ],
)
def test_a_scheme_that_is_not_read_is_said(
    weights: dict[str, Any] | None, name: str, why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        scheme_of(
            "m",
            {"config_groups": {"g": {"targets": ["Linear"], "weights": weights}}, "format": name},
        )


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"config_groups": {}}, "without config_groups"),
        ({"config_groups": None}, "without config_groups"),
        ({"config_groups": {"W8A8": ["Linear"]}}, "'W8A8', which is no object"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "'sparse-24-bitmask'"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "rotated"),
        ({"config_groups": {"g": group(INT4, name="marlin-24")}}, "'marlin-24'; read are pack-"),
        ({"config_groups": {"g": group(INT4, name="dense")}}, "'dense'"),
    ],
)
def test_a_config_that_is_not_read_is_said(change: dict[str, Any], why: str) -> None:
    said = said_of(group(INT4), format="pack-quantized", sparsity_config={}, transform_config={})
    assert refused(said) is None
    assert why in str(refused({**said, **change}))


@pytest.mark.parametrize(("pattern", "code"), [("re:(", "PSG141"), ("re:(.|..)+(?<=b)", "PSG140")])
def test_patterns_that_are_none_or_have_no_end_are_refused(pattern: str, code: str) -> None:
    with pytest.raises(SurgeryError, match=code):
        scheme_of("a" * 40, said_of(group(INT4, pattern), group(INT8, "Linear")))
