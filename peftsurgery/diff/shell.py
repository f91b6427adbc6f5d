"""shell: what every page is made of: its style, its scripts, its data, and what forbids the rest.

A page is one file. Its policy lets in its own style and script alone, known by their hashes, and
nothing from elsewhere; texts from models and rules are escaped or are JSON, never markup or code.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

ASSETS = Path(__file__).with_name("assets")
SCRIPTS = ("dom.js", "parts.js", "grower.js", "layout.js", "panel.js", "finder.js", "page.js")
LIBRARY, LICENCE = "dagre.min.js", "dagre.LICENSE"


def document(title: str, told: str, data: dict[str, Any] | None, below: str = "") -> str:
    """The whole file: ``told`` beside the graph of ``data``, if that is given, ``below`` it."""
    style = _asset("page.css")
    script = "" if data is None else scripts()
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    graph = "" if data is None else _GRAPH.format(views=_VIEWS if data["compared"] else "")
    plain = " plain" if data is None else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style></head>\n"
        f"<body><header><h1>{escape(title)}</h1></header>\n"
        f'<main><div class="work{plain}"><div class="told" tabindex="0" role="region" '
        f'aria-label="Summary">\n{told}\n</div>{graph}</div>\n{below}</main>\n'
        + ("" if data is None else _data(data) + f"<script>{script}</script>")
        + "</body></html>\n"
    )


@cache
def scripts() -> str:
    """The layout library with its licence, then the page's own scripts."""
    library = _asset(LIBRARY).partition("//# sourceMappingURL")[0]
    own = "\n".join(_asset(name) for name in SCRIPTS)
    return f"{_asset(LICENCE)}\n{library}\n{own}"


def address(path: str) -> str:
    """The link that opens a part of the graph; ``path`` is a module's."""
    return f'href="#/{quote(path, safe=":")}"'


def _data(data: dict[str, Any]) -> str:
    """The data as JSON that no text in it can end."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), default=str)
    safe = text.replace("<", r"\u003c")
    return f'<script type="application/json" id="data">{safe}</script>\n'


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


@cache
def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


_VIEWS = """
<fieldset><legend class="hidden">View</legend>
<label><input type="radio" name="view" value="one" checked> overlaid</label>
<label><input type="radio" name="view" value="two"> side by side</label></fieldset>"""

_GRAPH = """
<section class="graph" aria-label="Graph">
<div class="tools">
<div class="search"><input id="find" type="search" role="combobox" aria-label="Find a part"
 aria-expanded="false" aria-controls="results" aria-autocomplete="list" autocomplete="off"
 placeholder="find a part: name, role, operator ( / )">
<ul id="results" role="listbox" aria-label="Parts found" hidden></ul>
<span id="found" class="note" role="status"></span></div>{views}
<span><button id="do-out" aria-label="Smaller" type="button">−</button>
<button id="do-in" aria-label="Larger" type="button">+</button>
<button id="do-fit" type="button">fit</button>
<button id="do-shut" type="button">close all</button></span>
</div>
<div id="panes"></div>
<svg width="0" height="0" aria-hidden="true"><defs><marker id="arrow" viewBox="0 0 8 8" refX="7"
 refY="4" markerWidth="7" markerHeight="7" markerUnits="userSpaceOnUse" orient="auto">
<path d="M0 0L8 4L0 8Z"/></marker></defs></svg>
</section>
<aside id="panel" tabindex="0" aria-label="The chosen part"></aside>
"""
