"""Token settings given as text, converted with the base's tokenizer.

A setting that ends in ``_tokens`` holds token ids. Under the same name with ``_text`` in its place
it is given as a text, which the tokenizer in the model's directory turns into ids, the tokens that
it puts around every text included.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from transformers import AutoTokenizer

from peftsurgery.capture import Source
from peftsurgery.errors import SurgeryError, first_line
from peftsurgery.language.settings import tokens_setting


def with_tokens(
    settings: Mapping[str, Any], known: Collection[str], source: Source
) -> dict[str, Any]:
    """Replace texts by token ids in settings. Raises PSG126 without a tokenizer."""
    made = dict(settings)
    for name in settings:
        tokens = tokens_setting(name, known)
        if tokens is not None:
            made[tokens] = _ids(tokens, str(made.pop(name)), source)
    return made


def _ids(setting: str, text: str, source: Source) -> list[int]:
    try:
        if source.origin is None:
            raise OSError("the model was not captured from a directory")
        tokenizer = AutoTokenizer.from_pretrained(source.origin)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = first_line(error)
        raise SurgeryError(
            "PSG126", f"there is no tokenizer: {reason}", f"give {setting}=[...] instead"
        ) from error
    ids: list[int] = tokenizer(text)["input_ids"]
    if not ids:
        raise SurgeryError("PSG126", f"'{text}' has no tokens", f"give {setting}=[...] instead")
    return ids
