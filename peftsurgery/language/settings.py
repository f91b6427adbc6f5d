"""Settings: the defaults of ``with:``, what overrides them, and the numbers computed from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.language.document import read_scalar
from peftsurgery.language.evaluation import evaluate
from peftsurgery.language.schema import RuleFile


def resolve_settings(file: RuleFile, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Every setting and every number of the file's ``let``, by name.

    Raises PSG120 for an unknown setting and PSG121 for a value of another type than the default.
    """
    settings: dict[str, Any] = dict(file.with_)
    for name, value in (overrides or {}).items():
        if name not in settings:
            message = f"'{file.name}' has no setting '{name}'"
            hint = did_you_mean(name, settings) if settings else "it has no settings at all"
            raise SurgeryError("PSG120", message, hint)
        settings[name] = _fitting(name, value, file.with_[name])
    for name, expression in file.let.items():
        settings[name] = evaluate(expression, settings)
    return settings


def parse_override(text: str) -> tuple[str, Any]:
    """``rank=16`` as a name and a value.

    A value in commas is a list (``layers=0,1``), one in quotes a text: ``init_text="good, bad"``.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise SurgeryError("PSG121", f"'{text}' is not of the form name=value")
    value = value.strip()
    if len(value) > 1 and value[0] == value[-1] == '"':
        return name.strip(), value[1:-1]
    if value.startswith("[") and value.endswith("]"):
        value = value[1:-1]
    elif "," not in value:
        return name.strip(), read_scalar(value)
    return name.strip(), [read_scalar(item.strip()) for item in value.split(",") if item.strip()]


def _fitting(name: str, value: Any, default: Any) -> Any:
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(default, list) and not isinstance(value, list):
        value = [value]
    if _type(value) != _type(default) and default is not None:
        message = f"the setting '{name}' is {_type(default)}, and {value!r} is {_type(value)}"
        raise SurgeryError("PSG121", message, f"its default is {default!r}")
    if isinstance(value, float) and not abs(value) < 2**63:
        raise SurgeryError("PSG121", f"the setting '{name}' cannot be {value}")
    return value


def _type(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a text"
    return "a list" if isinstance(value, list) else "nothing" if value is None else "an object"
