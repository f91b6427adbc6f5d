"""What rules say of other libraries' files, under ``checkpoint``: one table for each format.

The table of a whole rule file has config keys, that of one rule the key suffixes of its parameters.
Both are read here as plain mappings, so that a page can be asked before its rules are checked.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

MODULES, TABLE, WITH = "modules", "table", "with"
"""What a rule's `checkpoint` calls the config key that lists the rule's modules, and the table of
the format's own that says what the parameters are called; what a file's calls implied settings."""


def identifying_keys(table: Mapping[str, Any], settings: Collection[str]) -> dict[str, Any]:
    """The config keys whose values identify a method, of a rule file with these settings."""
    return {
        key: value
        for key, value in table.items()
        if key != WITH and not (isinstance(value, str) and value in settings)
    }


def carried_settings(table: Mapping[str, Any], settings: Collection[str]) -> dict[str, str]:
    """The config keys that carry one of these settings, and the setting's name."""
    return {
        key: str(value)
        for key, value in table.items()
        if isinstance(value, str) and value in settings
    }


def key_suffixes(table: Mapping[str, str], params: Collection[str]) -> dict[str, str]:
    """The key suffix of each parameter of a rule."""
    return {name: suffix for name, suffix in table.items() if name in params}


def reserved_entry(table: Mapping[str, str], params: Collection[str], word: str) -> str | None:
    """What a rule says under :data:`MODULES` or :data:`TABLE`, where no parameter is called so."""
    return None if word in params else table.get(word)
