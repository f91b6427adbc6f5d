"""Settings: the defaults of ``with:``, what overrides them, and the numbers computed from them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.language.document import read_scalar
from peftsurgery.language.environment import with_lets
from peftsurgery.language.readings import check_sizes
from peftsurgery.language.said import SaidFile

TOKENS, TEXT = "_tokens", "_text"
"""How settings that hold token ids end, and what stands in its place where they are a text."""

LARGEST = 2**63


def resolve_settings(file: SaidFile, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Resolve a file's settings with overrides: settings and ``let`` numbers by name.

    Numbers, arrays and tensors of numpy and torch are taken as the numbers that they hold. Raises
    PSG120 for an unknown setting, PSG121 for a value of another type than the default, PSG122 for a
    parameter's size that is not at least 1, and what evaluation raises for ``let``.
    """
    settings: dict[str, Any] = dict(file.with_)
    for name, value in (overrides or {}).items():
        if name not in settings:
            message = f"'{file.name}' has no setting '{name}'"
            hint = did_you_mean(name, settings) if settings else "it has no settings at all"
            raise SurgeryError("PSG120", message, hint)
        settings[name] = _fitting(name, value, file.with_[name])
    numbers = with_lets(settings, file.let)
    for rule in file.rules:
        if rule.applies(numbers):
            check_sizes(rule, settings, file.let)
    return {name: numbers[name] for name in numbers}


def check_settings(files: Iterable[SaidFile], settings: Mapping[str, Any]) -> None:
    """Refuse settings that could not be applied with these files, before there is a model.

    Every name must be known to one of the files, or be that of a setting of tokens with a text in
    its place. Raises what :func:`resolve_settings` raises.
    """
    files = list(files)
    known = {name for file in files for name in file.with_}
    for name, value in settings.items():
        tokens = tokens_setting(name, known)
        if tokens is None and name not in known:
            hint = did_you_mean(name, known) if known else "the rules have no settings"
            raise SurgeryError("PSG120", f"no rule has a setting '{name}'", hint)
        if tokens is not None and not isinstance(value, str):
            message = f"the setting '{name}' is a text, and {value!r:.60} is {_type(value)}"
            raise SurgeryError("PSG121", message, f"tokens themselves go into {tokens}")
    for file in files:
        resolve_settings(file, settings_of(file, settings))


def settings_of(file: SaidFile, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Filter settings to those that the file declares."""
    return {name: value for name, value in settings.items() if name in file.with_}


def tokens_setting(name: str, known: Collection[str]) -> str | None:
    """The setting of tokens that ``name`` gives as a text, or None: it is a setting, or nothing."""
    tokens = name.removesuffix(TEXT) + TOKENS
    return tokens if name not in known and name.endswith(TEXT) and tokens in known else None


def parse_override(text: str) -> tuple[str, Any]:
    """Parse ``rank=16`` into a name and a value.

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


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """Parse several overrides into a dict. Raises PSG121 for a name given twice."""
    settings: dict[str, Any] = {}
    for text in texts:
        name, value = parse_override(text)
        if name in settings:
            message = f"the setting '{name}' is given twice: {settings[name]!r} and {value!r}"
            raise SurgeryError("PSG121", message, f"a list is one value: {name}=1,2")
        settings[name] = value
    return settings


def _fitting(name: str, value: Any, default: Any) -> Any:
    """The value as the rules read it. PSG121 if it is of another type than the default."""
    value = _plain(value)
    if isinstance(default, list) and value is None:
        return None  # as in a page: a clause whose names are nothing holds everywhere
    if isinstance(default, list) and not isinstance(value, list):
        value = [value]
    wanted = "a value" if default is None else _type(default)
    fits = _type(value) == wanted or (default is None and _type(value) != "an object")
    if not fits:
        message = f"the setting '{name}' is {wanted}, and {value!r:.60} is {_type(value)}"
        raise SurgeryError("PSG121", message, f"its default is {default!r}")
    for one in value if isinstance(value, list) else [value]:
        if _type(one) in ("a list", "an object"):
            message = f"the setting '{name}' cannot hold {one!r:.60}, which is {_type(one)}"
            raise SurgeryError("PSG121", message, f"its default is {default!r}")
        if isinstance(one, int | float) and not abs(one) < LARGEST:
            raise SurgeryError("PSG121", f"the setting '{name}' cannot be {one!r:.60}")
    return value


def _plain(value: Any) -> Any:
    """A number, array or tensor of another library as Python's numbers, a sequence as a list."""
    if isinstance(value, type):
        return value
    if callable(tolist := getattr(value, "tolist", None)):
        try:
            value = tolist()
        except (RuntimeError, NotImplementedError):  # a tensor that holds no numbers
            return value
    if isinstance(value, list | tuple | range):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, str) else value


def _type(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a text"
    return "a list" if isinstance(value, list) else "nothing" if value is None else "an object"
