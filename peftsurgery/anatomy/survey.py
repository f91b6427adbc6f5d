"""survey: the sites of a whole model, each block's under its absolute names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..capture import Capture, Program
from .analysis import analyse
from .site import Placed, Site, join


@dataclass(frozen=True, eq=False)
class Survey:
    """Every site of one capture of a model, the top graph's first, then block by block."""

    sites: tuple[Placed, ...]

    def __iter__(self) -> Iterator[Placed]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


def survey(capture: Capture) -> Survey:
    """The sites of a capture. A program is analysed once, however many blocks run it."""
    found: list[Placed] = []
    for path, programs in capture.programs.items():
        for program in programs:
            found += placed(program, path)
    return Survey(tuple(found))


def placed(program: Program, path: str) -> list[Placed]:
    """A program's sites in the block at ``path``."""
    layer = layer_of(path)
    return [
        Placed(site, path, program, layer, type_of(program, site), attention_of(site, path))
        for site in analyse(program).sites
    ]


def layer_of(path: str) -> int | None:
    """The index of the block in its list; that of the outermost list if lists are nested."""
    return next((int(name) for name in path.split(".") if name.isdigit()), None)


def type_of(program: Program, site: Site) -> str:
    """The class name of the module that a site belongs to."""
    info = program.modules.get(site.module)
    return program.kind if info is None else info.type


def attention_of(site: Site, path: str) -> str | None:
    """The id of the core that a site belongs to, or is: unique in a model."""
    core = site if site.kind == "attention" else site.core
    return None if core is None else f"{join(path, core.module)}:{core.nodes['o'].name}"
