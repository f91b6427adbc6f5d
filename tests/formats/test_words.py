"""What pages of rules say of a format is what their rules say once they are read."""

from __future__ import annotations

import pytest

from peftsurgery.formats.words import shipped_forms
from peftsurgery.language.loading import load_rules
from peftsurgery.language.shipped import shipped


@pytest.mark.parametrize("format_name", ["peft", "adapterhub"])
def test_pages_say_of_a_format_what_their_rules_say(format_name: str) -> None:
    forms = {form.name: form for form in shipped_forms(format_name)}
    for name in shipped():
        file = load_rules(name)
        identifying = file.identifying(format_name)
        assert (name in forms) == bool(identifying)
        if identifying:
            form = forms[name]
            suffixes = [rule.suffixes(format_name).values() for rule in file.rules]
            listings = {rule.listing(format_name) for rule in file.rules}
            assert form.file.name == name
            assert form.identifying == identifying
            assert form.suffixes == {each for values in suffixes for each in values}
            assert form.listings == listings - {None}
