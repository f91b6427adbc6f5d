"""YAML: safe, exact about places, and without YAML 1.1's surprises."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftsurgery.errors import SurgeryError
from peftsurgery.language.document import MAX_BYTES, read_document

BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"

HOSTILE = {
    "alias bomb": (BOMB, "PSG104", "f:1:4"),
    "alias": ("a: *x\n", "PSG104", "f:1:4"),
    "python tag": ("a: !!python/object/apply:os.system [x]\n", "PSG104", "f:1:4"),
    "plain tag": ("a: !!str 3\n", "PSG104", "f:1:4"),
    "tagged key": ("!!str a: 3\n", "PSG104", "f:1:1"),
    "anchor": ("a: &x 3\n", "PSG104", "f:1:4"),
    "duplicate": ("a: 1\nb: 2\na: 3\n", "PSG103", "f:3:1"),
    "deep duplicate": ("a:\n  - {b: 1, b: 2}\n", "PSG103", "f:2:12"),
    "brackets": ("a: " + "[" * 5000, "PSG102", "f:1:5"),
    "braces": ("a: " + "{a: " * 5000, "PSG102", "f:1:"),
    "unclosed": ("a: [1, 2\n", "PSG101", "f:2:1"),
    "tab": ("a:\n\tb: 1\n", "PSG101", "f:2:1"),
    "control": ("a: \x07\n", "PSG101", "f"),
    "not UTF-8": (b"a: 1\nb: \xff\n", "PSG102", "f:2"),
    "empty": ("", "PSG102", "f"),
    "comment": ("# nothing\n", "PSG102", "f"),
    "a list": ("- 1\n", "PSG102", "f"),
    "a word": ("hello\n", "PSG102", "f"),
    "two documents": ("a: 1\n---\nb: 2\n", "PSG102", "f:2:1"),
    "a number as key": ("4: 1\n", "PSG106", "f:1:1"),
    "a list as key": ("? [a]\n: 1\n", "PSG106", "f:1:3"),
    "infinite": ("a: 1e999\n", "PSG106", "f:1:4"),
    "too large": ("a: " + "x" * MAX_BYTES, "PSG102", "f"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_yaml_is_refused_with_code_and_place_at_once(name):
    text, code, where = HOSTILE[name]
    start = time.perf_counter()
    with pytest.raises(SurgeryError) as refusal:
        read_document(text, "f")
    assert refusal.value.code == code
    assert refusal.value.where.startswith(where)
    assert time.perf_counter() - start < 2


def test_fifty_levels_are_read_and_more_are_not():
    read_document("a: " + "[" * 49 + "]" * 49, "f")
    with pytest.raises(SurgeryError):
        read_document("a: " + "[" * 51 + "]" * 51, "f")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-3", -3),
        ("010", 10),
        ("0x10", "0x10"),
        ("on", "on"),
        ("yes", "yes"),
        ("No", "No"),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("'3'", "3"),
        ('"true"', "true"),
        (".inf", ".inf"),
        ("2024-01-01", "2024-01-01"),
    ],
)
def test_scalars_mean_what_they_look_like(text, value):
    found = read_document(f"a: {text}\n", "f").data["a"]
    assert found == value
    assert isinstance(found, type(value))


def test_texts_know_their_place():
    document = read_document("a:\n  - plain\n  - 'quoted'\n  - |\n    block\n", "f")
    plain, quoted, block = document.data["a"]
    assert str(plain.at(2)) == "f:2:7"
    assert str(quoted.at(2)) == "f:3:8"
    assert not block.exact
    assert str(document.position(("a", 1))) == "f:3:5"
    assert str(document.position(("a", 9, "missing"))) == "f:2:3"


@given(st.text(max_size=120))
@settings(max_examples=300, deadline=None)
def test_any_text_is_read_or_refused_with_a_code(text):
    try:
        data = read_document(text, "f").data
    except SurgeryError:
        return
    assert isinstance(data, dict)


@given(st.binary(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_read_or_refused_with_a_code(content):
    try:
        document = read_document(content, "f")
    except SurgeryError:
        return
    assert isinstance(document.data, dict)
