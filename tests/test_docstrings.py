"""What help() and pydoc say of every public name."""

from __future__ import annotations

import inspect
import pydoc

import pytest

import peftsurgery as ps


@pytest.mark.parametrize("name", ps.__all__)
def test_a_public_name_has_a_docstring_whose_first_line_is_a_sentence(name: str) -> None:
    public = getattr(ps, name)
    first = (inspect.getdoc(public) or "").partition("\n")[0]
    assert first.endswith(".")
    assert first[0].isupper()
    assert len(first.split()) > 2
    assert first in pydoc.plaintext.document(public, name)


@pytest.mark.parametrize("name", ps.__all__)
def test_so_has_every_public_method_that_is_ours(name: str) -> None:
    public = getattr(ps, name)
    for part, value in vars(public).items() if isinstance(public, type) else ():
        value = value.func if hasattr(value, "func") else getattr(value, "fget", value)
        if not part.startswith("_") and inspect.isfunction(value):
            first = (inspect.getdoc(value) or "").partition("\n")[0]
            assert first.endswith((".", ":")), f"{name}.{part}"
