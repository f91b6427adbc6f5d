"""What the page of a deep difference costs its reader: until it is open, and each step in it.

``python -m tools.bench pages`` captures two Llamas of 70B on meta, one of them with LoRA in all but
one of 80 layers and another activation in a layer, and opens the page of their difference from the
disk in a fresh headless chromium, several times. Open is: loaded, the parts drawn, and two frames
painted after that. Then it opens layers and modules, one after the other, and waits for two frames
each. Exit code 1 if the page takes 2 s to open at the median, or a step 0.2 s.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from tools.bench.differences import deep_graphs
from tools.bench.fresh import measured

LIMIT_OPEN, LIMIT_STEP = 2.0, 0.2
TURNS = 5
STEPS = (
    "model.layers.0",
    "model.layers.0.self_attn",
    "model.layers.0.self_attn.q_proj",
    "model.layers.40",
    "model.layers.40.mlp",
)
PAINTED = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


def written(file: str) -> dict[str, float]:
    """Write the page; its size in bytes, and the seconds of the processor that writing took."""
    import peftsurgery as ps

    sides = deep_graphs()
    layers = {"any": [{"layers": "0..9"}, {"layers": "11.."}]}
    found = ps.diff(sides[0], ps.apply(sides[1], "lora_qv", where=layers))
    started = time.process_time()
    found.to_html(file)
    return {"seconds": time.process_time() - started, "bytes": Path(file).stat().st_size}


def opened(file: str) -> dict[str, Any]:
    """Seconds until the page is open and of every step, at the median, and what is drawn then."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium")
    if program is None:
        raise FileNotFoundError("this needs chromium: apt-get install chromium")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    times: dict[str, list[float]] = {}
    parts = 0
    with sync_playwright() as driver:
        for _ in range(TURNS):
            browser = driver.chromium.launch(executable_path=program, args=arguments)
            tab = browser.new_page(viewport={"width": 1300, "height": 850})
            started = time.perf_counter()
            tab.goto(Path(file).as_uri())
            tab.wait_for_selector("[role=treeitem]")
            tab.evaluate(PAINTED)
            times.setdefault("open", []).append(time.perf_counter() - started)
            for step in STEPS:
                head = tab.locator(f'[role=treeitem][data-id="{step}"] .head').first
                head.scroll_into_view_if_needed()
                started = time.perf_counter()
                head.evaluate("part => part.click()")
                tab.evaluate(PAINTED)
                times.setdefault(step, []).append(time.perf_counter() - started)
            parts = tab.locator("*").count()
            browser.close()
    return {"parts": parts, **{what: statistics.median(each) for what, each in times.items()}}


def main(arguments: list[str]) -> int:
    """Measure, print, and say whether the limits hold."""
    console = Console(width=110)
    with TemporaryDirectory() as folder:
        file = str(Path(folder, "page.html"))
        made = measured("pages", "written", file)
        seen = measured("pages", "opened", file)
    slowest = max(STEPS, key=lambda step: seen[step])
    console.print(
        f"the page of two graphs of 80 layers: {made['bytes'] / 1e6:.2f} MB, written in "
        f"{made['seconds']:.2f} s; open after {seen['open']:.2f} s, a step takes up to "
        f"{seen[slowest]:.3f} s ({slowest}); {seen['parts']} elements in the end"
    )
    broken = seen["open"] > LIMIT_OPEN or seen[slowest] > LIMIT_STEP
    if broken:
        console.print(f"[red]over {LIMIT_OPEN} s to open or {LIMIT_STEP} s for a step[/red]")
    return int(broken)
