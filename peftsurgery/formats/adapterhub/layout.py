"""What the library calls the parts of a layer: by its table, or by the keys of an adapter.

For models that the table does not list, a key tells the layer by its path, the kind of site by what
follows the holder (``adapters.*.adapter_down...``), and the sublayer by the holder itself: it is
the module that ends one, or its name says which.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

from peftsurgery.anatomy import Placed
from peftsurgery.errors import SurgeryError
from peftsurgery.formats.adapterhub.library import FORMAT, layouts, named, sublayers
from peftsurgery.formats.words import forms


@dataclass(frozen=True)
class Layout:
    """What the library calls the parts of a layer, relative to it; None for what is not known.

    See ``library.yaml``.
    """

    attention: str | None = None
    ffn: str | None = None
    prefix: str | None = None
    intermediate: str | None = None
    output: str | None = None


LINEARS = ("intermediate", "output")
MATRICES = ("q", "k", "v")
INPUTS = tuple(f"attn.{name}" for name in MATRICES)


def listed_layout(model_type: str) -> Layout:
    """What the table says of a type of model; nothing of one that it does not list."""
    return Layout(**layouts().get(model_type, {}))


def found_layout(
    keys: Iterable[str], sites: Sequence[Placed], blocks: Mapping[str, str], flags: Collection[str]
) -> Layout:
    """The layout that the keys of an adapter's tensors tell.

    ``blocks`` are the paths of the model's layers as the library writes them, and what they are in
    the model; ``flags`` are the linears of LINEARS that the adapter's config asks for. PSG513 for a
    key that tells no sublayer, or for two names of one part.
    """
    found: dict[str, set[str]] = {field.name: set() for field in fields(Layout)}
    linears: dict[str, str] = {}
    for block, holder, kind in _held(keys, blocks):
        here = [s for s in sites if s.block == blocks[block] and s.kind == kind]
        if kind == "residual":
            found[_sublayer(holder, here)].add(holder)
        elif kind == "attention":
            found["prefix"].add(holder)
        elif kind == "linear":
            at = [site for site in here if site.site.module == holder and not is_input(site)]
            linears |= {site.site.module: str(site.role) for site in at}
    # which of two is which makes no difference to what they compute
    paths = sorted(linears, key=lambda path: (linears[path], path), reverse=True)
    for part, path in zip((p for p in LINEARS if p in flags), paths, strict=False):
        found[part].add(path)
    for part, names in found.items():
        if len(names) > 1:
            listed = " and ".join(f"'{name}'" for name in sorted(names))
            raise SurgeryError("PSG513", f"the adapter's tensors have {listed} for one {part}")
    return Layout(**{part: next(iter(names), None) for part, names in found.items()})


def is_input(site: Placed) -> bool:
    """Whether a linear makes the queries, keys or values of an attention core."""
    return str(site.role) in INPUTS


def _held(keys: Iterable[str], blocks: Collection[str]) -> Iterator[tuple[str, str, str]]:
    """For each key in a layer: the layer, the holder in it, and the kind of site it is about."""
    endings = dict(_endings())
    for key in keys:
        block = max((b for b in blocks if key.startswith(f"{b}.")), key=len, default=None)
        if block is None:
            continue
        rest = key.removeprefix(f"{block}.")
        for (word, last), kind in endings.items():
            holder, middle, tail = f".{rest}".partition(f".{word}.")
            if middle and tail.partition(".")[2] == last:
                yield block, holder[1:], kind
                break


def _endings() -> Iterator[tuple[tuple[str, str], str]]:
    """What is before and after the adapter's name in the keys of modules, and the kind of site."""
    for file in forms(FORMAT):
        for rule in file.rules:
            for suffix in named(rule).values() if rule.params else ():
                word, star, last = suffix.partition(".*.")
                if star and not word.startswith("/"):
                    yield (word, last), rule.kind.name


def _sublayer(holder: str, sites: Sequence[Placed]) -> str:
    """The sublayer that a holder is of: attention or ffn. PSG513 if it cannot be told."""
    ends = {str(site.facts.get("after")) for site in sites if site.site.module == holder}
    known = sublayers()
    if len(ends) == 1 and ends <= known.keys():
        return ends.pop()
    for part, words in known.items():
        if any(word in holder.lower() for word in words):
            return part
    message = f"the adapter's tensors are beneath '{holder}' of a layer"
    raise SurgeryError("PSG513", f"{message}, which tells no sublayer of the model")
