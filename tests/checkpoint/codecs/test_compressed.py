"""Weights of compressed-tensors: what the package reads in them, to the last bit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import save_file

from peftsurgery.checkpoint.codecs.coded import CodedWeight, PlainView, plain_view
from peftsurgery.errors import SurgeryError
from peftsurgery.model_files import read_model_files
from tests.checkpoint.codecs.compressed import (
    FLOATS,
    INTS,
    KINDS,
    MXFP4,
    NVFP4,
    PACKED,
    compressed,
    said_of,
    scheme_of,
)

Tensors = dict[str, torch.Tensor]


def view_of(folder: Path, tensors: Tensors, said: dict[str, Any]) -> PlainView:
    """A base that has these tensors."""
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": said}))
    return plain_view(read_model_files(folder))


def read(folder: Path, tensors: Tensors, said: dict[str, Any]) -> CodedWeight:
    return view_of(folder, tensors, said).coded["m.weight"]


def weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_to_the_last_bit_what_the_package_reads(tmp_path: Path, kind: str) -> None:
    tensors, said, meant = KINDS[kind](weight(40, 96))
    found = read(tmp_path, tensors, said).values()
    assert meant.dtype == torch.float32
    np.testing.assert_array_equal(found, meant.numpy())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "weights"),
    [
        (PACKED, {"num_bits": 4, "strategy": "group", "group_size": 32}),
        (PACKED, {"num_bits": 8, "strategy": "channel"}),
        (INTS, {"num_bits": 8, "strategy": "channel"}),
        (INTS, {"num_bits": 8, "strategy": "tensor"}),
    ],
)
def test_scales_of_half_precision_are_multiplied_in_fp32_and_the_package_rounds_that(
    tmp_path: Path, name: str, weights: dict[str, Any], dtype: torch.dtype, symmetric: bool
) -> None:
    scheme = scheme_of(name, **weights, symmetric=symmetric)
    tensors, meant = compressed(weight(40, 96).to(dtype), scheme)
    assert (tensors["m.weight_scale"].dtype, meant.dtype) == (dtype, dtype)
    found = read(tmp_path, tensors, said_of(scheme)).values()
    assert torch.equal(torch.from_numpy(found).to(dtype), meant)


@pytest.mark.parametrize("columns", [1, 7, 9, 31, 33, 100])
@pytest.mark.parametrize("rows", [1, 5, 8, 13])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_and_columns_need_not_fill_their_last_word(
    tmp_path: Path, bits: int, rows: int, columns: int
) -> None:
    scheme = scheme_of(PACKED, num_bits=bits, strategy="channel", symmetric=False)
    tensors, meant = compressed(weight(rows, columns), scheme)
    mine = read(tmp_path, tensors, said_of(scheme))
    np.testing.assert_array_equal(mine.values(), meant.numpy())
    parts = mine.stored()
    made = {**parts, **mine.codec.encode(mine.values(), parts, mine.said)}
    for name, part in parts.items():  # the package, too, fills up with zeros
        np.testing.assert_array_equal(made[name], part)


@pytest.mark.parametrize("kind", KINDS)
def test_the_package_reads_what_is_written_again(tmp_path: Path, kind: str) -> None:
    tensors, said, _ = KINDS[kind](weight(40, 96))
    mine = read(tmp_path, tensors, said)
    values = mine.values() + 0.05 * weight(96, 40).T.numpy()
    parts = mine.stored()
    made = {**parts, **mine.codec.encode(values, parts, mine.said)}
    for name, (_, tensor) in mine.parts.items():
        stored = tensors[tensor.name]
        content = torch.frombuffer(bytearray(made[name].tobytes()), dtype=torch.uint8)
        tensors[tensor.name] = content.view(stored.dtype).reshape(stored.shape)
    group = said["config_groups"]["group_0"]
    group["weights"].pop("actorder", None)
    scheme = QuantizationScheme(**group)
    state = {name.removeprefix("m."): value for name, value in tensors.items()}
    order = state.pop("weight_g_idx", None)
    theirs = BaseCompressor.get_value_from_registry(str(scheme.format)).decompress(state, scheme)
    if order is None:  # which the package no longer reads
        found = torch.from_numpy(mine.values_of(made)).to(theirs["weight"].dtype)
        assert torch.equal(found, theirs["weight"])


def test_zeros_of_a_symmetric_weight_are_read_where_they_are(tmp_path: Path) -> None:
    scheme = scheme_of(INTS, num_bits=8, strategy="channel")
    tensors, _ = compressed(weight(8, 16), scheme)
    tensors["m.weight_zero_point"] = torch.arange(8, dtype=torch.int8)[:, None]
    state = {name.removeprefix("m."): value for name, value in tensors.items()}
    meant = BaseCompressor.get_value_from_registry(INTS).decompress(state, scheme)["weight"]
    np.testing.assert_array_equal(read(tmp_path, tensors, said_of(scheme)).values(), meant.numpy())


def test_groups_by_no_order_follow_one_another(tmp_path: Path) -> None:
    tensors, said, meant = KINDS["packed"](weight(8, 64))
    tensors["m.weight_g_idx"] = torch.full((64,), -1, dtype=torch.int32)
    np.testing.assert_array_equal(read(tmp_path, tensors, said).values(), meant.numpy())


def test_numbers_of_fewer_bits_stay_in_their_range(tmp_path: Path) -> None:
    tensors, said, _ = KINDS["bytes_four"](weight(32, 64))
    mine = read(tmp_path, tensors, said)
    made = mine.codec.encode(mine.values() * 3, mine.stored(), mine.said)
    assert (made["weight"].min(), made["weight"].max()) == (-8, 7)


def cut(name: str) -> Any:
    return lambda tensors: tensors.update({name: tensors[name][..., :-1].contiguous()})


def put(name: str, value: torch.Tensor) -> Any:
    return lambda tensors: tensors.update({name: value})


def dropped(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("kind", "damage", "why"),
    [
        ("packed", dropped("m.weight_scale"), "no 'm.weight_scale'"),
        ("packed", dropped("m.weight_packed"), "no 'm.weight_packed'"),
        ("packed", dropped("m.weight_shape"), "no 'm.weight_shape'"),
        ("packed", cut("m.weight_packed"), "weight_packed is [32, 7], not [32, 8]"),
        ("packed", cut("m.weight_scale"), "weight_scale is [32, 3], not [32, 4]"),
        ("packed", put("m.weight_shape", torch.tensor([32, 72])), "weight_packed is"),
        ("packed", put("m.weight_shape", torch.tensor([32, 63])), "do not divide its 63 inputs"),
        ("packed", put("m.weight_shape", torch.tensor([33, 64])), "weight_packed is"),
        ("packed", put("m.weight_shape", torch.tensor([-32, -64])), "weight_packed is"),
        ("packed", put("m.weight_shape", torch.tensor([32, 64, 1])), "unpack"),
        ("packed", put("m.weight_packed", torch.zeros(32, 8)), "kept in float32"),
        ("packed", put("m.weight_packed", torch.zeros(2, 16, 8).int()), "no matrix"),
        ("packed", put("m.weight_scale", torch.ones(32, 4).int()), "scale is kept in int32"),
        ("packed", put("m.weight_g_idx", torch.zeros(3).int()), "weight_g_idx is [3]"),
        ("packed", put("m.weight_scale", torch.ones(32, 4).to(torch.float8_e5m2)), "F8_E5M2"),
        ("packed_in_order", dropped("m.weight_g_idx"), "no weight_g_idx"),
        ("packed_zeros", dropped("m.weight_zero_point"), "no weight_zero_point"),
        ("packed_zeros", cut("m.weight_zero_point"), "weight_zero_point is [4, 3], not [4, 4]"),
        ("packed_zeros", put("m.weight_zero_point", torch.zeros(4, 4)), "kept in float32"),
        ("packed_zeros", put("m.weight_zero_point", torch.zeros(4, 4).char()), "unlike"),
        ("bytes", put("m.weight", torch.zeros(32, 64)), None),
        ("bytes", put("m.weight", torch.zeros(32, 64).byte()), "kept in uint8"),
        ("bytes", put("m.weight", torch.zeros(0, 64).char()), "it is empty"),
        ("bytes", put("m.weight_scale", torch.ones(1)), "weight_scale is [1], not [32, 1]"),
        ("bytes_tensor", put("m.weight_scale", torch.ones(32)), "weight_scale is [32]"),
        ("floats", dropped("m.weight_scale"), "no 'm.weight_scale'"),
        ("floats", put("m.weight_scale", torch.ones(1)), "weight_scale is [1], not [32, 1]"),
        ("floats_tensor", put("m.weight_scale", torch.ones(32, 1)), "not [1, 1]"),
        ("floats_block", put("m.weight_scale", torch.ones(1, 1)), "weight_scale is [1, 1]"),
        ("floats_group", cut("m.weight"), "do not divide its 63 inputs"),
        ("nvfp4", dropped("m.weight_global_scale"), "no 'm.weight_global_scale'"),
        ("nvfp4", put("m.weight_global_scale", torch.zeros(1)), "no number above 0"),
        ("nvfp4", put("m.weight_global_scale", torch.ones(2)), "no number above 0"),
        ("nvfp4", put("m.weight_global_scale", torch.tensor([float("nan")])), "no number above"),
        ("nvfp4", cut("m.weight_scale"), "weight_scale is [32, 3], not [32, 4]"),
        ("mxfp4", cut("m.weight_scale"), "weight_scale is [32, 1], not [32, 2]"),
        ("mxfp4", put("m.weight_scale", torch.ones(32, 2)), "scale is kept in float32"),
        ("mxfp4", dropped("m.weight_scale"), "no 'm.weight_scale'"),
        ("nvfp4", cut("m.weight_packed"), "do not divide its 62 inputs"),
    ],
)
def test_parts_that_do_not_fit_are_said(
    tmp_path: Path, kind: str, damage: Any, why: str | None
) -> None:
    tensors, said, _ = KINDS[kind](weight(32, 64))
    damage(tensors)
    view = view_of(tmp_path, tensors, said)
    assert not view.coded
    found = view.why_unread("m.weight")
    assert found is not None
    assert why is None or why in found


@pytest.mark.parametrize(
    ("order", "why"),
    [(torch.zeros(64), "weight_g_idx"), (torch.arange(64) // 8, "weight_g_idx")],
)
def test_an_order_of_groups_of_other_sizes_is_refused(
    tmp_path: Path, order: torch.Tensor, why: str
) -> None:
    tensors, said, _ = KINDS["packed"](weight(8, 64))
    tensors["m.weight_g_idx"] = order.int()
    with pytest.raises(SurgeryError, match=rf"PSG416.*{why}"):
        read(tmp_path, tensors, said).values()


def test_each_module_is_read_by_the_group_that_names_it(tmp_path: Path) -> None:
    schemes = {
        "a": scheme_of(PACKED, num_bits=4, strategy="group", group_size=32),
        "b": scheme_of(PACKED, num_bits=8, strategy="channel"),
        "c": scheme_of(FLOATS, num_bits=8, type="float", strategy="tensor"),
        "e": scheme_of(MXFP4, num_bits=4, type="float", strategy="group", group_size=32),
        "d": scheme_of(NVFP4, num_bits=4, type="float", strategy="tensor_group", group_size=16),
    }
    tensors, meant = {}, {}
    for name, scheme in schemes.items():
        made, meant[name] = compressed(weight(16, 64), scheme)
        tensors |= {f"{name}{key.removeprefix('m')}": value for key, value in made.items()}
        scheme.targets = [f"re:{name}$"]
    view = view_of(tmp_path, tensors, said_of(*schemes.values(), name="mixed-precision"))
    assert view.coded.keys() == {f"{name}.weight" for name in schemes}
    for name, value in meant.items():
        np.testing.assert_array_equal(view.coded[f"{name}.weight"].values(), value.numpy())
    assert not view.unread


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_a_group_that_grew_gets_a_scale_that_reaches_it(tmp_path: Path, kind: str) -> None:
    small = weight(8, 64)
    small[3, :32] *= 0.01
    tensors, said, _ = KINDS[kind](small)
    mine = read(tmp_path, tensors, said)
    values, parts = mine.values(), mine.stored()
    values[3, :32] *= 50
    found = mine.values_of({**parts, **mine.codec.encode(values, parts, mine.said)})
    np.testing.assert_array_equal(np.delete(found, 3, 0), np.delete(values, 3, 0))
    gap, largest = np.abs(found - values)[3, :32], np.abs(values[3, :32]).max()
    assert gap.max() <= largest / 5  # half of the widest step is a sixth, of powers a bit more


def test_zeros_of_floats_are_refused_unless_they_are_0(tmp_path: Path) -> None:
    tensors, said, meant = KINDS["floats"](weight(8, 64))
    tensors["m.weight_zero_point"] = torch.zeros(8, 1).to(torch.float8_e4m3fn)
    np.testing.assert_array_equal(read(tmp_path, tensors, said).values(), meant.numpy())
    tensors["m.weight_zero_point"] = torch.ones(8, 1).to(torch.float8_e4m3fn)
    with pytest.raises(SurgeryError, match=r"PSG416.*weight_zero_point is not 0"):
        read(tmp_path, tensors, said).values()
