"""Reserved words: parameter names of ``apply`` that no setting may have.

Settings may be given as keyword arguments of a function, beside its own parameters. A setting of
the name of one of those could not be given in that way, so a rule file that declares it is refused.
"""

from __future__ import annotations

from peftsurgery.errors import SurgeryError
from peftsurgery.language.position import position_of

RESERVED = frozenset({"model", "rules", "name", "train", "settings", "where", "by", "exact"})


def check_reachable(setting: str) -> None:
    """Refuse a setting that could not be given as a keyword. PSG106."""
    if setting in RESERVED:
        message = f"a setting cannot be called '{setting}'"
        hint = f"applying rules takes these words for itself: {', '.join(sorted(RESERVED))}"
        raise SurgeryError("PSG106", message, hint, position_of(setting))
