"""Units in the last place, against what numpy and exact arithmetic say of them."""

import ml_dtypes
import numpy as np
import pytest

from peftsurgery.checkpoint.arrays import FLOATS, ulp


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("wide", [np.float32, np.float64])
def test_an_ulp_is_the_distance_to_the_next_number(dtype: str, wide: type) -> None:
    info = ml_dtypes.finfo(FLOATS[dtype])
    values = np.array([1, 1.5, 2, 3.99, 1e-3, 6e4, 65504, -7, 0, 1e-30, -1e-30], wide)
    _, exponents = np.frexp(np.maximum(np.abs(values), wide(info.smallest_normal)))
    wanted = np.ldexp(wide(1), exponents - 1 - info.nmant)
    assert np.array_equal(ulp(values, np.zeros_like(values), dtype), wanted)
    assert np.array_equal(ulp(np.zeros_like(values), values, dtype), wanted)


def test_an_ulp_of_fp32_is_numpys_spacing() -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    assert np.array_equal(ulp(values, values, "F32"), np.spacing(np.abs(values)))
