"""What transformers changes of models while they are traced, of those that are imported.

It has patches for some thirty architectures, and imports every one of them to patch it. A model can
only be made of what is imported, so the others are left alone: they take as long to import as a
small model to capture.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from transformers.exporters import utils

MODELS = "transformers.models."


@contextmanager
def patched() -> Iterator[None]:
    """Trace models in transformers' way for torch.export within the context."""
    with ExitStack() as stack:
        with utils.patch_attribute(utils, "import_dotted_path", _of_what_is_imported):
            stack.enter_context(utils.apply_patches("dynamo"))
        yield


def _of_what_is_imported(original: Callable[..., Any]) -> Callable[..., Any]:
    """The function that finds what is at a path, without importing architectures for it."""

    def found(path: str, missing_ok: bool = False) -> Any:
        module = ".".join(path.split(".")[:4])  # transformers.models.bert.modeling_bert
        if missing_ok and path.startswith(MODELS) and module not in sys.modules:
            return None
        return original(path, missing_ok)

    return found
