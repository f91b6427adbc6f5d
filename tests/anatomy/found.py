"""The sites of a model of the zoo."""

from __future__ import annotations

from peftsurgery.anatomy import Placed, survey
from tests.models.captured import captured


def sites(name: str, kind: str) -> list[Placed]:
    """Those of one kind, in the model's order."""
    return [site for site in survey(captured(name).captures[0]) if site.kind == kind]
