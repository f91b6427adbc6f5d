"""The layout of Stable Diffusion's own code, by counting the blocks of a UNet of diffusers.

``down_blocks.1.attentions.0`` of diffusers is ``input_blocks.4.1`` where a resolution has two
resnets and a sampler: block 0 is the first convolution, the first resolution has 1 to 3, and an
attention is the second cell of its block. All of it follows from which resnets, attentions and
samplers the base has, so one count holds for every UNet; the words are in ``library.yaml``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from functools import cache
from itertools import chain

from peftsurgery.formats.foreign.library import foreign_words


def laid_out_otherwise(modules: Collection[str]) -> dict[str, str]:
    """What the modules at these paths are called in the other layout, where it has them.

    ``modules`` are the paths of all convolutions and linears: a cell without any is not counted.
    """
    names: dict[str, str] = foreign_words()["layout"]["modules"]
    found = {path: names[path] for path in modules if path in names}
    within = {path: cell for path in modules if (cell := _cell().match(path)) is not None}
    places = dict(_places({cell[1] for cell in within.values()}))
    for path, cell in within.items():
        if cell[1] in places:
            found[path] = f"{places[cell[1]]}.{_inside(cell['kind'], cell['rest'])}"
    return found


@cache
def _cell() -> re.Pattern[str]:
    """The path of a module in a cell: that of the cell, its stage and kind, and the rest."""
    words = foreign_words()["layout"]
    kinds = "|".join({*words["cells"], *words["inside"]})
    stages = "|".join([*(rf"{row}\.\d+" for row in words["rows"]), *words["middle"]])
    return re.compile(rf"((?P<stage>{stages})\.(?P<kind>{kinds})\.\d+)\.(?P<rest>.+)")


def _inside(kind: str, rest: str) -> str:
    """The path of a module in its cell, as the other layout has it."""
    first, *more = rest.split(".")
    names = foreign_words()["layout"]["inside"].get(kind, {})
    return ".".join([names.get(first, first), *more])


def _places(cells: Collection[str]) -> Iterator[tuple[str, str]]:
    """Each cell (``down_blocks.1.resnets.0``) with its place in the other layout."""
    words = foreign_words()["layout"]
    for row, said in words["rows"].items():
        stages = {int(cell.split(".")[1]) for cell in cells if cell.startswith(f"{row}.")}
        blocks = chain.from_iterable(
            _blocks(cells, f"{row}.{stage}", said.get("alone"), said.get("with_last"))
            for stage in sorted(stages)
        )
        for number, block in enumerate(blocks, said["first"]):
            for place, cell in enumerate(block):
                yield cell, f"{said['called']}.{number}.{place}"
    for stage, called in words["middle"].items():
        for place, cell in enumerate(chain.from_iterable(_blocks(cells, stage))):
            yield cell, f"{called}.{place}"


def _blocks(
    cells: Collection[str], stage: str, alone: str | None = None, with_last: str | None = None
) -> list[list[str]]:
    """The cells of a stage by the blocks that they make up in the other layout."""
    kinds = foreign_words()["layout"]["cells"]
    count = sum(cell.startswith(f"{stage}.{kinds[0]}.") for cell in cells)
    named = [[f"{stage}.{kind}.{index}" for kind in kinds] for index in range(count)]
    if with_last is not None and named:
        named[-1].append(f"{stage}.{with_last}.0")
    if alone is not None:
        named.append([f"{stage}.{alone}.0"])
    blocks = [[cell for cell in block if cell in cells] for block in named]
    return [block for block in blocks if block]
