"""What a codec is: a matrix said by several tensors of a file, read as numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peftsurgery.checkpoint.arrays import Array
from peftsurgery.checkpoint.codecs.bands import Bands

Shapes = Mapping[str, tuple[int, ...]]
Parts = Mapping[str, Array]
Said = Mapping[str, Any]


@dataclass(frozen=True)
class Codec:
    """How a quantiser keeps a weight (out, in), or a stack of such.

    ``parts`` are the endings of its tensors' names, by what they are; the first is the one in whose
    place the weight stands, ``optional`` ones may be missing, ``small`` ones are read to know the
    shape. ``plain`` is how the weight's own name ends. ``shape`` gives the weight's shape from
    those of the parts; ``decode`` gives its values in fp32 from the parts, as stored, and the
    config of the quantiser. ``encode`` gives the parts that another weight has in place of these,
    in their shapes and dtypes. ``bands`` says, from the same as ``shape``, how rows of the weight
    can be read and written by themselves; None if they cannot. ``refuses`` says why a config is
    none that is read; None for one that is. ``scheme`` gives what a config says of a module, by its
    name, which is what the others get of it: None if the module is another codec's, ValueError with
    the reason if it is none's. ``aside`` gives the endings of tensors that the quantiser keeps and
    that are of no weight: where weights are written plain, they are not.
    """

    name: str
    parts: Mapping[str, str]
    shape: Callable[[Parts, Said], tuple[int, ...]]
    decode: Callable[[Parts, Said], Array]
    encode: Callable[[Array, Parts, Said], Mapping[str, Array]]
    refuses: Callable[[Said], str | None] = lambda said: None
    optional: tuple[str, ...] = ()
    small: tuple[str, ...] = ()
    plain: str = ".weight"
    bands: Callable[[Parts, Said], Bands | None] = lambda parts, said: None
    scheme: Callable[[str, Said], Said | None] = lambda module, said: said
    aside: Callable[[Said], tuple[str, ...]] = lambda said: ()
