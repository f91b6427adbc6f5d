"""Numbers that a dtype has."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftsurgery.surgery.rewrite.dtypes import HALVES, has_number

NUMBERS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(-300, 300).map(float),
    st.builds(lambda part, power: part * 2.0**power, st.integers(-2100, 2100), st.integers(-30, 6)),
)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@given(number=NUMBERS)
def test_a_number_that_a_dtype_has_is_not_rounded(dtype: torch.dtype, number: float) -> None:
    rounded = torch.tensor(number, dtype=torch.float64).to(dtype).item()
    is_normal = number == 0 or abs(number) >= torch.finfo(dtype).tiny
    assert has_number(dtype, number) == (rounded == number and is_normal)
