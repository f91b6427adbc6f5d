"""Plans as JSON: what is read back is what was written."""

from pathlib import Path

from peftsurgery.checkpoint.plan import FoldPlan, SiteFold
from peftsurgery.checkpoint.plan_file import plan_as_json, plan_from_json
from peftsurgery.language.expression import parse
from tests.checkpoint import streamed


def texts(site: SiteFold) -> list[dict[str, str]]:
    return [{name: text.text for name, text in part.items()} for part in (site.fold, site.let)]


def test_every_part_of_a_plan_comes_back(tmp_path: Path) -> None:
    site = SiteFold(
        adapter="a",
        module="m",
        weights={"W": "m.weight"},
        parameters={"A": "m.a.A"},
        numbers={"in": 3, "kernel": (3, 3), "scale": 0.1, "target": None, "stabilised": True},
        fold={"W": parse("W + scale * view_as(A, W) if in > 2 else W")},
        let={"twice": parse("2 * A")},
        absent=("b",),
        turned=frozenset({"W"}),
        slice=(0, 4, 12, 2),
        rows={"A": 1},
        lines={"B": 0},
    )
    plan = FoldPlan(
        (site, *streamed.plan_of(2).sites),
        {"head": "a.head"},
        {"base": "x", "folded": [{"adapter": "a"}]},
        {"README.md": b"\xff\x00 text"},
        frozenset({"tokenizer.json"}),
    )
    again = plan_from_json(plan_as_json(plan))
    assert (again.replaced, again.record) == (plan.replaced, plan.record)
    assert (again.files, again.without) == (plan.files, plan.without)
    for mine, theirs in zip(again.sites, plan.sites, strict=True):
        assert texts(mine) == texts(theirs)
        for name in ("adapter", "module", "weights", "parameters", "numbers", "absent", "turned"):
            assert getattr(mine, name) == getattr(theirs, name)
        assert (mine.slice, mine.rows, mine.lines) == (theirs.slice, theirs.rows, theirs.lines)
