"""The page in a real browser: what a reader does with it, what it may not do, and for whom."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import peftsurgery as ps
from peftsurgery.diff.atlas import atlas
from peftsurgery.diff.comparison import Diff, diff
from peftsurgery.diff.lines import lines
from peftsurgery.diff.page import page
from peftsurgery.diff.script import compare
from peftsurgery.language.loading import load_rules
from peftsurgery.language.settings import resolve_settings
from peftsurgery.surgery.plan.cut import Operation
from tests.diff.deep import deep
from tests.diff.models import Layer, Recipe, captured

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("browser")]

TOOLS = Path(__file__).parents[2] / "tools" / "page" / "node_modules"
EVIL = "</script><img src=x onerror=alert(1)>"


@dataclass
class Seen:
    """A page that is open, with what it asked for and complained of."""

    tab: Any
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def item(self, address: str) -> Any:
        """The part that is drawn for an address."""
        return self.tab.locator(f'[role=treeitem][data-id="{address}"]')

    @property
    def panel(self) -> str:
        """What the panel says."""
        return str(self.tab.inner_text("#panel"))

    def comes_to(self, address: str) -> None:
        """Wait for what a link leads to: the address changes at once, the rest in an event."""
        self.until(
            "address => document.querySelector('#panel').innerText.startsWith(address)", address
        )

    def until(self, function: str, argument: Any = None) -> None:
        """Ask a function of the page until it says yes.

        The driver's own wait asks again by `eval` within the page, which the page's policy forbids.
        """
        end = time.monotonic() + 5
        while not self.tab.evaluate(function, argument):
            assert time.monotonic() < end, f"never true: {function}"
            time.sleep(0.02)

    def is_open(self, address: str) -> bool:
        return self.item(address).get_attribute("aria-expanded") == "true"

    def press(self, *keys: str) -> None:
        for key in keys:
            self.tab.keyboard.press(key)

    @property
    def focused(self) -> str:
        """The address of the part that has the focus."""
        return str(self.tab.evaluate("document.activeElement.dataset.id"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium")
    if program is None:
        pytest.fail("these tests need chromium: apt-get install chromium")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=program, args=arguments)
        yield started
        started.close()


@pytest.fixture
def see(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Opens a page from disk; at the end it has complained of nothing, and asked for itself."""
    opened: list[tuple[Any, Seen]] = []

    def see(text: str, fragment: str = "", **how: Any) -> Seen:
        file = tmp_path / f"page{len(opened)}.html"
        file.write_text(text, encoding="utf-8")
        context = browser.new_context(**{"viewport": {"width": 1300, "height": 850}, **how})
        context.set_default_timeout(5000)
        seen = Seen(context.new_page())
        seen.tab.on("requestfinished", lambda request: seen.requests.append(request.url))
        seen.tab.on("console", lambda said: seen.complaints.append(said.text))
        seen.tab.on("pageerror", lambda error: seen.complaints.append(str(error)))
        seen.tab.goto(f"{file.as_uri()}{fragment}")
        seen.tab.wait_for_selector("[role=treeitem]")
        opened.append((context, seen))
        return seen

    yield see
    for context, seen in opened:
        assert seen.complaints == []
        assert {url.partition("#")[0].rpartition("/")[2][:4] for url in seen.requests} == {"page"}
        context.close()


@pytest.fixture(scope="module")
def lora() -> Diff:
    """LoRA in all but one of four layers."""
    graph = captured(Recipe((Layer(),) * 4))
    return diff(
        graph, ps.apply(graph, "lora_qv", where={"any": [{"layers": "0..1"}, {"layers": 3}]})
    )


@pytest.fixture(scope="module")
def edited() -> Diff:
    """A norm removed in one layer, another activation in the next."""
    layers = (Layer(norm="none"), Layer(act="gelu"), Layer())
    return diff(captured(Recipe((Layer(),) * 3)), captured(Recipe(layers)))


def test_repeats_are_one_part_that_opens_on_a_click(see: Any, lora: Diff) -> None:
    seen = see(lora.to_html())
    assert [seen.item(f"layers.{n}").count() for n in range(4)] == [1, 0, 1, 1]
    assert "layers.0..1 ×2" in seen.item("layers.0").inner_text()
    seen.item("layers.0").click()
    assert seen.is_open("layers.0")
    assert seen.item("layers.0.attn").is_visible()
    seen.item("layers.0").locator(".head").first.click()
    assert not seen.is_open("layers.0")


def test_what_changed_has_a_sign_beside_its_colour(see: Any, lora: Diff, edited: Diff) -> None:
    seen = see(lora.to_html(), "#/layers.0.attn.q")
    added = seen.tab.locator('[data-id^="layers.0.attn.q:"].added')
    assert added.count() == 4
    assert all(text.startswith("+ ") for text in added.all_inner_texts())
    assert ", added" in added.first.text_content()
    assert seen.item("layers.0").inner_text().startswith("~ ")
    other = see(edited.to_html(), "#/layers.0.ln")
    assert other.item("layers.0.ln").inner_text().startswith("− ")
    assert other.tab.locator("svg text.removed").count() > 0


def test_the_panel_says_what_is_known_of_a_site(see: Any, lora: Diff) -> None:
    said = see(lora.to_html(), "#/layers.1.attn.q").panel
    for part in (
        "layers.1.attn.q",
        "attn.q",
        "+ lora_qv(rank 8) on attn.q",
        "y ← y + scale·B·A·drop(x)",
        "folds into W ← W + scale·B·A",
        "layers.1.attn.q.lora_qv.A",
        "float32[8, 8], frozen (was trained)",
        "self.qkv(x).chunk(3, -1) if self.fused",
    ):
        assert part in said
    bound = dict(re.findall(r"^(x|W|y|b)\s+(.+)$", said, re.M))
    assert bound["x"].startswith("ln ")
    assert bound["W"].startswith("attn.q.weight ")
    node = see(lora.to_html(), "#/layers.1.attn.k").panel
    assert "models.py" in node
    assert "self.qkv(x).chunk(3, -1) if self.fused" in node


def test_it_finds_by_name_and_by_role(see: Any, lora: Diff) -> None:
    seen = see(lora.to_html())
    seen.press("/")
    seen.tab.keyboard.type("attn.v")
    assert "found" in seen.tab.inner_text("#found")
    assert seen.tab.locator("#results li").count() >= 3
    seen.press("ArrowDown", "Enter")
    assert seen.focused == "layers.0.attn.v"
    assert "layers.0.attn.v" in seen.panel
    seen.press("/")
    seen.tab.fill("#find", "no such part")
    assert seen.tab.inner_text("#found") == "0 found"


def test_links_lead_to_parts_and_out_of_changes(see: Any, lora: Diff) -> None:
    seen = see(lora.to_html(), "#/layers.3.mlp.up")
    assert seen.panel.startswith("layers.3.mlp.up")
    seen.tab.locator(".changes a:not(.sign)").first.click()
    seen.comes_to("layers.0.attn.q")
    assert seen.is_open("layers.0.attn.q")
    seen.tab.locator("#panel a", has_text="ln").first.click()
    seen.comes_to("layers.0.ln")
    assert seen.focused == "layers.0.ln"
    assert seen.tab.url.endswith("#/layers.0.ln")
    seen.tab.evaluate("location.hash = '#/nothing.there'")
    assert seen.focused == "layers.0.ln"


def test_it_is_worked_by_keys_alone(see: Any, lora: Diff) -> None:
    seen = see(lora.to_html())
    for _ in range(40):
        seen.press("Tab")
        if seen.focused == ":ids":
            break
    assert seen.focused == ":ids"
    seen.press("ArrowDown", "ArrowDown")
    assert seen.focused == "layers.0"
    seen.press("ArrowRight")
    assert seen.is_open("layers.0")
    seen.press("ArrowRight", "ArrowDown")
    assert seen.focused.startswith("layers.0.")
    assert seen.panel.startswith("layers.0.")
    seen.press("ArrowLeft")
    assert seen.focused == "layers.0"
    seen.press("Enter")
    assert not seen.is_open("layers.0")
    seen.press("End")
    assert seen.focused == ":output"
    seen.press("Home")
    assert seen.focused == ":ids"


def test_both_models_stand_side_by_side(see: Any, edited: Diff) -> None:
    seen = see(edited.to_html())
    seen.tab.get_by_label("side by side").check()
    trees = seen.tab.get_by_role("tree")
    assert trees.count() == 2
    drawn = [trees.nth(n).locator(".run").count() for n in (0, 1)]
    assert drawn == [3, 3]
    assert trees.nth(0).locator(".added").count() == 0
    assert trees.nth(1).locator(".removed").count() == 0
    seen.tab.evaluate("location.hash = '#/layers.0.ln'")
    seen.comes_to("layers.0.ln")
    assert [trees.nth(n).locator('[data-id="layers.0.ln"]').count() for n in (0, 1)] == [1, 0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_has_no_serious_fault_of_access(see: Any, lora: Diff, edited: Diff, scheme: str) -> None:
    source = (TOOLS / "axe-core" / "axe.min.js").read_text(encoding="utf-8")
    for found, fragment in ((lora, "#/layers.1.attn.q"), (edited, "#/layers.1.mlp.act")):
        seen = see(found.to_html(), fragment, color_scheme=scheme)
        seen.tab.evaluate(source)
        outcome = seen.tab.evaluate("axe.run()")
        faults = [
            (each["id"], each["nodes"][0]["html"][:200])
            for each in outcome["violations"]
            if each["impact"] in ("serious", "critical")
        ]
        assert faults == []
        assert len(outcome["passes"]) > 15


def test_it_fits_a_telephone(see: Any, lora: Diff) -> None:
    seen = see(lora.to_html(), viewport={"width": 360, "height": 700})
    wide = seen.tab.evaluate("document.documentElement.scrollWidth")
    assert wide <= 360
    tops = [seen.tab.locator(f).bounding_box()["y"] for f in (".told", ".graph", "#panel")]
    assert tops == sorted(tops)
    seen.item("layers.0").click()
    assert seen.is_open("layers.0")


def test_nothing_leaves_it(see: Any, lora: Diff) -> None:
    seen = see(lora.to_html())
    seen.tab.evaluate(
        """() => {
          window.held = [];
          addEventListener('securitypolicyviolation', (e) => held.push(e.effectiveDirective));
          fetch('https://example.org/').catch(() => 0);
          for (const [tag, from] of [['img', 'src'], ['script', 'src'], ['iframe', 'src']]) {
            const made = document.createElement(tag);
            made[from] = 'https://example.org/';
            document.body.append(made);
          }
          const inner = document.createElement('script');
          inner.textContent = 'document.title = "hurt"';
          document.body.append(inner);
        }"""
    )
    seen.until("() => held.length >= 5")
    assert seen.tab.title() != "hurt"
    assert all("Content Security Policy" in said for said in seen.complaints)
    seen.complaints.clear()


def test_names_are_shown_and_not_obeyed(see: Any) -> None:
    graph = captured(Recipe((Layer(),) * 2, names=("embed", "layers", EVIL)))
    found = diff(graph, ps.apply(graph, "lora_qv"))
    evil = [replace(line, text=EVIL) for line in found.summary.lines]
    text = page(replace(found.summary, names=(EVIL, EVIL), lines=evil), found.models, found.script)
    seen = see(text)
    assert EVIL in seen.tab.inner_text("#panes")
    seen.tab.fill("#find", "onerror")
    assert seen.tab.locator("#results li").count() == 1
    seen.press("Enter")
    assert seen.panel.startswith(EVIL)
    assert seen.tab.locator("img").count() == 0
    assert seen.tab.title() == f"{EVIL} → {EVIL}"
    assert json.loads(seen.tab.inner_text("#data") or seen.tab.text_content("#data"))


def test_of_a_deep_model_only_what_is_open_is_laid_out(see: Any) -> None:
    graph = captured(Recipe((Layer(),) * 3))
    one, other = (deep(diff(graph, each).models[1]) for each in (graph, ps.apply(graph, "lora_qv")))
    found = diff(graph, ps.apply(graph, "lora_qv"))
    script = compare(one, other)
    summary = replace(found.summary, lines=lines(script, one, other))
    seen = see(page(summary, (one, other), script))
    assert "×79" in seen.item("layers.0").inner_text()
    for address in ("layers.0", "layers.0.attn", "layers.0.attn.q", "layers.79"):
        seen.item(address).locator(".head").first.click()
        seen.until("address => location.hash == '#/' + address", address)
        assert seen.is_open(address)
    assert seen.tab.locator("*").count() < 2500


def test_weights_that_changed_lead_into_the_graph(see: Any) -> None:
    graph = captured(Recipe((Layer(),) * 3))
    changed = ps.fold(trained(ps.apply(graph, "lora_qv")))
    ids = torch.zeros(2, 5, dtype=torch.long)
    found = diff(graph, ps.capture(changed, inputs={"ids": ids}), weights=True)
    seen = see(found.to_html())
    cell = seen.tab.locator(".heat td a").first
    assert "%" in cell.inner_text()
    assert "attn.q" in seen.tab.inner_text(".heat thead")
    cell.click()
    assert seen.focused.startswith("layers.0.")


def trained(operated: Any) -> Any:
    """An adapter whose values are not those that it starts with."""
    with torch.no_grad():
        for parameter in operated.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    return operated


def test_the_atlas_marks_what_a_rule_would_match(see: Any) -> None:
    file = load_rules("lora_qv")
    operation = Operation(file, resolve_settings(file), file.name)
    seen = see(atlas(captured(Recipe((Layer(),) * 4)), "a model", [operation]), "#/layers.2.attn.v")
    assert "would match 8 sites" in seen.tab.inner_text(".told")
    assert "Would match: lora_qv(rank 8) on attn.v" in seen.panel
    assert "◆" in seen.item("layers.0.attn.v").inner_text()
    assert "◆" not in seen.item("layers.0.attn.k").inner_text()
    assert seen.tab.locator("input[name=view]").count() == 0
    seen.tab.locator(".told table a").first.click()
    assert seen.focused.startswith("layers.0.attn.")


def test_the_library_in_it_is_the_one_that_is_published() -> None:
    assets = Path(ps.__file__).parent / "diff" / "assets"
    published = TOOLS / "@dagrejs" / "dagre" / "dist"
    for ours, theirs in (
        ("dagre.min.js", "dagre.min.js"),
        ("dagre.LICENSE", "dagre.min.js.LEGAL.txt"),
    ):
        assert (assets / ours).read_bytes() == (published / theirs).read_bytes()
