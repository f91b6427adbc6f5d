"""Dotted names are put together by one function, and are what torch calls modules."""

from __future__ import annotations

from torch import nn

from peftsurgery.capture.names import join


def test_a_joined_name_is_torchs_own() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(1, 1)))
    names = [join(path, name) for path, part in model.named_modules() for name in part._parameters]
    assert names == [name for name, _ in model.named_parameters()]
    assert [join("", ""), join("a", ""), join("", "a"), join("a.b", "c")] == ["", "a", "a", "a.b.c"]
