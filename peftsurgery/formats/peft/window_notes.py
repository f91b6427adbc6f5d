"""Prefixes on models whose attention has windows: where peft's differ from those here.

peft hands a prefix to the model as what it remembers of earlier text, so it slides out of a window
as earlier text does. Here every query of a core sees the prefix, however long the text is: that is
what the method says (Li and Liang, 2021). The two agree while prefix and text fit into the window.
"""

from __future__ import annotations

from torch import Tensor

from peftsurgery.anatomy.windows import windows
from peftsurgery.capture import GraphModel
from peftsurgery.capture.generating import new_cache, remembers
from peftsurgery.capture.sources import Source


def window_notes(model: GraphModel, length: int) -> tuple[str, ...]:
    """What a reader should know of a prefix of this length on a model; nothing without windows.

    A model has the windows that its masks have, and those that the cache declares which it makes
    itself.
    """
    found = windows(model.base_capture, lambda name: _buffer(model.source, name))
    if remembers(model.source.module):
        layers = getattr(new_cache(model.source.module), "layers", ())
        sliding = (layer for layer in layers if getattr(layer, "is_sliding", False))
        found |= {int(getattr(layer, "sliding_window", 0)) for layer in sliding}
    if not found:
        return ()
    sizes = " and ".join(str(size) for size in sorted(found))
    return (
        f"attention sees windows of {sizes} tokens: in peft the prefix of {length} slides out of "
        "them, and here it stays in sight; the outputs differ for texts that do not fit into a "
        "window together with the prefix",
    )


def _buffer(source: Source, name: str) -> Tensor | None:
    """A buffer of the base, read now if it has to be; None for parameters and constants."""
    found = dict(source.module.named_buffers(remove_duplicate=False)).get(name)
    if found is None or not found.is_meta or not source.is_readable:
        return found
    return source.weights().get_buffer(name)
