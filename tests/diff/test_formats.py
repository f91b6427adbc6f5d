"""The formats say the same, harm no reader, and stand alone."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

import peftsurgery as ps
from peftsurgery.diff.comparison import Diff, diff
from peftsurgery.diff.lines import Line
from peftsurgery.diff.page import page
from peftsurgery.diff.text import rendered
from tests.diff.models import Layer, Recipe, captured

EVIL = "<script>alert(1)</script>\x1b[31m`"


def found() -> Diff:
    layers = (Layer(), Layer(act="gelu"), Layer())
    return diff(captured(), captured(Recipe(layers)))


class Reader(HTMLParser):
    """Checks that tags close in order, and notes what a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.ids += [named["id"] or ""] if "id" in named else []
        self.links += [str(named[name]) for name in ("href", "src") if name in named]
        self.scripts += tag == "script"
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    found().to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert len(set(reader.ids)) == len(reader.ids)
    assert {link for link in reader.links if not link.startswith("#")} == set()
    assert {link[1:] for link in reader.links if not link.startswith("#/")} <= set(reader.ids)
    assert "default-src 'none'" in unescape(text)
    assert not re.search(r"https?://", text)
    assert "silu → gelu" in text
    assert "Permission is hereby granted" in text
    assert reader.scripts == 2


def test_a_place_that_no_page_can_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ps.SurgeryError) as refused:
        found().to_html(tmp_path / "file" / "page.html")
    assert refused.value.code == "PSG603"


def test_names_from_files_are_shown_and_not_obeyed() -> None:
    one = found()
    lines = [replace(line, where=EVIL, text=EVIL) for line in one.summary.lines]
    summary = replace(one.summary, names=(EVIL, EVIL), lines=lines)
    reader = Reader()
    reader.feed(page(summary, one.models, one.script))
    assert reader.open == []
    assert reader.scripts == 2
    assert "\x1b" not in rendered(summary, width=80)
    named = replace(one, summary=summary)
    assert "\x1b" not in named.to_markdown()
    assert "`` <script>" in named.to_markdown() or "``<script>" in named.to_markdown()


def test_text_folds_to_the_width_and_needs_no_colour() -> None:
    summary = found().summary
    narrow = rendered(summary, width=40)
    assert max(len(line) for line in narrow.splitlines()) <= 40
    plain, coloured = rendered(summary, width=80), rendered(summary, width=80, colour=True)
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured).split() == plain.split()


def test_a_screen_has_room_for_some_of_every_part_and_says_what_it_leaves_out() -> None:
    one = found().summary
    extra = [Line("tensor", "+", f"t{n}", "new", 1) for n in range(70)]
    many = replace(one, lines=[*one.lines, *extra])
    shown = rendered(many, width=80, height=40)
    assert len(shown.splitlines()) <= 40
    assert "silu → gelu" in shown
    (left_out,) = re.findall(r"and (\d+) more", shown)
    assert shown.count("new") == 70 - int(left_out)
    assert rendered(many, width=80).count("new") == 70
    assert rendered(one, width=80, height=40) == rendered(one, width=80)


def test_json_and_text_have_the_same_changes() -> None:
    one = found()
    document = json.loads(json.dumps(one.to_dict()))
    assert document["schema"] == "peftsurgery.diff/1"
    assert len(document["changes"]) == len(one.summary.lines)
    for change in document["changes"]:
        assert change["where"] in str(one)
    assert document["weights"] is None
    assert document["headline"]["a"]["nodes"] == 114


def test_a_notebook_shows_it() -> None:
    graph = captured()
    shown = diff(graph, ps.apply(graph, "lora_qv"))._repr_html_()
    assert "lora_qv(rank 8) on attn.q" in shown
