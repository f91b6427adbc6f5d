"""Words that no setting may be called by."""

from __future__ import annotations

import inspect

import peftsurgery as ps
from peftsurgery.language.reserved import RESERVED


def test_reserved_are_the_parameters_of_apply_beside_which_settings_are_given() -> None:
    own = inspect.signature(ps.apply).parameters.values()
    assert {one.name for one in own if one.kind is not inspect.Parameter.VAR_KEYWORD} == RESERVED
