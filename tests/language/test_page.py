"""What pages say unchecked is what their rules say once they are checked."""

from __future__ import annotations

import pytest

import peftsurgery as ps
from peftsurgery.language.loading import dump_rules, load_rules
from peftsurgery.language.page import pages_with, read_page
from peftsurgery.language.shipped import shipped

FORMATS = ("peft", "adapterhub")


@pytest.mark.parametrize("name", shipped())
def test_a_page_answers_as_the_checked_rules_do(name: str) -> None:
    page, file = read_page(name), load_rules(name)
    assert (page.name, page.let) == (file.name, file.let)
    assert dict(page.with_) == file.with_
    assert page.flat == (None if file.flat is None else file.flat.rule)
    for each in FORMATS:
        assert page.identifying(each) == file.identifying(each)
        assert page.carried(each) == file.carried(each)
    for mine, rule in zip(page.rules, file.rules, strict=True):
        assert (mine.kind, mine.let, mine.fold) == (rule.kind, rule.let, rule.fold)
        shapes = {name: param.shape for name, param in rule.params.items()}
        assert {name: param.shape for name, param in mine.params.items()} == shapes
        assert mine.is_plain == (rule.when is None and not rule.over and not rule.store)
        for each in FORMATS:
            assert mine.suffixes(each) == rule.suffixes(each)
            assert mine.listing(each) == rule.listing(each)


@pytest.mark.parametrize("name", shipped())
def test_the_text_of_a_page_reads_as_the_same_rules(name: str) -> None:
    said = ps.parse_rules(read_page(name).text())
    assert dump_rules(said) == dump_rules(load_rules(name))


def test_a_condition_on_settings_holds_or_not() -> None:
    rules = [rule for name in shipped() for rule in load_rules(name).rules if rule.when]
    pages = [rule for name in shipped() for rule in read_page(name).rules if rule.said.get("when")]
    assert rules
    for mine, rule in zip(pages, rules, strict=True):
        assert rule.when is not None
        for value in (0, 1):
            settings = dict.fromkeys(rule.when.names, value)
            assert mine.applies(settings) == rule.applies(settings)


def test_a_page_that_is_changed_says_the_rest_as_before() -> None:
    page = read_page("lora")
    changed = page.changed(let=None, name="mine")
    assert (changed.name, changed.let, changed.with_) == ("mine", {}, page.with_)
    assert page.let


def test_a_word_is_found_on_pages_that_stand_on_others() -> None:
    found = set(pages_with("LORA"))
    for name in shipped():
        identifying = load_rules(name).identifying("peft")
        assert name in found or identifying.get("peft_type") != "LORA"
    assert "ia3" not in found
