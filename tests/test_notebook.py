"""What notebooks show: well-formed, escaped, whole, without a script or anything from elsewhere."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import peftsurgery as ps
from peftsurgery.anatomy import survey
from peftsurgery.language.schema import Rule
from peftsurgery.language.selection import select
from peftsurgery.notebook import SHOWN, notes, shown, table

VOID = {"br", "hr"}


class Page(HTMLParser):
    """Reads HTML: the cells of its rows, its tags, and what it gets wrong."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.folded: list[list[str]] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            (self.folded if "details" in self.open else self.rows).append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            rows = self.folded if "details" in self.open else self.rows
            rows[-1].append(data)
        elif "style" not in self.open:
            self.text += data


def test_names_are_escaped_wherever_they_stand() -> None:
    evil = "<script>alert('x')</script> & \"co\""
    page = Page(shown(evil, table(("a", evil), [(evil, 1)]), notes([evil])))
    assert "script" not in page.tags
    assert page.rows == [["a", evil], [evil, "1"]]
    assert page.text.count(evil) == 2


def test_a_long_table_folds_and_loses_nothing() -> None:
    rows = [(number, f"row {number}") for number in range(1000, 1000 + 3 * SHOWN)]
    page = Page(shown("t", table(("n", "text"), rows)))
    assert page.rows[1:] == [[f"{n:,}", text] for n, text in rows[:SHOWN]]
    assert page.folded[1:] == [[f"{n:,}", text] for n, text in rows[SHOWN:]]
    assert f"{2 * SHOWN} more" in page.text
    assert table(("n",), []) == ""


class Layer(nn.Module):
    """A block, of one structure or of another."""

    def __init__(self, bent: bool = False) -> None:
        super().__init__()
        self.bent, self.inner = bent, nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        return torch.sin(y) if self.bent else x + torch.tanh(y)


class Many(nn.Module):
    """More blocks than a table shows, one of another kind, and a name that looks like HTML."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(SHOWN + 4))
        self.layers.append(Layer(bent=True))
        self.add_module("<b>&", nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        found: torch.Tensor = self.get_submodule("<b>&")(x)
        return found


@pytest.fixture(scope="module")
def graph() -> ps.GraphModel:
    return ps.capture(Many(), {"x": torch.randn(2, 4)})


RULE = Rule(
    match="linear",
    where={"not": {"path": ".*3.inner"}},
    params={"A": {"shape": ["out", "in"]}},
    rewrite="y + linear(x, A)",
)


def test_a_model_shows_equal_blocks_in_one_row(graph: ps.GraphModel) -> None:
    page = Page(graph._repr_html_())
    total = sum(p.numel() for p in Many().parameters())
    assert f"GraphModel[Many]: {total:,} parameters" in page.text
    last = SHOWN + 3
    assert page.rows[1:] == [
        [f"layers.0 … layers.{last}", "Layer", str(last + 1)],
        [f"layers.{last + 1}", "Layer", "1"],
    ]


def test_a_report_shows_every_cut(graph: ps.GraphModel) -> None:
    report = ps.apply(graph, RULE, name="one").report
    page = Page(report._repr_html_())
    cells = [row for row in page.rows + page.folded if row[0] == "one"]
    assert [row[-1] for row in cells] == [name for m in report.matches for name in m["added"]]
    assert any("<b>&" in cell for row in cells for cell in row)
    assert f"{report.trainable:,} of {report.total:,}" in page.text
    assert ["layers.3.inner", "it is (path matches .*3.inner)"] in page.rows


def test_an_operated_model_shows_its_blocks_and_its_report(graph: ps.GraphModel) -> None:
    operated = ps.apply(graph, RULE, name="one")
    page = Page(operated._repr_html_())
    assert ["blocks", "class", "count"] in page.rows
    assert ["adapter", "role", "site", "added"] in page.rows


def test_a_selection_shows_what_it_keeps_and_why_it_drops_the_rest(graph: ps.GraphModel) -> None:
    selection = select(survey(graph.base_capture), RULE)
    page = Page(selection._repr_html_())
    kept = [row[0] for row in page.rows + page.folded]
    assert {site.module for site in selection.kept} <= set(kept)
    assert ["layers.13.inner", "it is (path matches .*3.inner)"] in page.rows
    assert f"{len(selection.kept)} of {len(selection.candidates)} sites" in page.text


def test_nothing_runs_and_nothing_is_fetched(graph: ps.GraphModel) -> None:
    operated = ps.apply(graph, RULE)
    for one in (graph, operated, operated.report):
        text = one._repr_html_()
        page = Page(text)
        assert page.tags <= {"div", "style", "b", "table", "tr", "td", "th", "details", "summary"}
        assert page.attributes <= {"class"}
        assert not any(word in text for word in ("http", "url(", "@import", "color:#", "rgb("))
