"""What transformers changes of models while they are traced, of those that are imported.

It has patches for some thirty architectures, and imports every one of them to patch it. A model can
only be made of what is imported, so the others are left alone: they take as long to import as a
small model to capture.

Some models ask whether they are exported, to take operators that other formats know. A capture is
of what the model computes when it is called, to the last bit, so they are told that they are not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers.exporters import utils

MODELS = "transformers.models."
EXPORTED, COMPILED = "is_torchdynamo_exporting", "is_torchdynamo_compiling"


@contextmanager
def patched(model: nn.Module) -> Iterator[None]:
    """Trace a model in transformers' way for torch.export, as it computes when it is called."""
    with ExitStack() as stack:
        with utils.patch_attribute(utils, "import_dotted_path", _of_what_is_imported):
            stack.enter_context(utils.apply_patches("dynamo"))
        files = {type(part).__module__ for part in model.modules()}
        for file in (sys.modules[name] for name in files if hasattr(sys.modules[name], EXPORTED)):
            for question in (EXPORTED, COMPILED):
                if hasattr(file, question):
                    stack.enter_context(utils.patch_attribute(file, question, _denied))
        yield


def _denied(original: Callable[[], bool]) -> Callable[[], bool]:
    return lambda: False


def _of_what_is_imported(original: Callable[..., Any]) -> Callable[..., Any]:
    """The function that finds what is at a path, without importing architectures for it."""

    def found(path: str, missing_ok: bool = False) -> Any:
        module = ".".join(path.split(".")[:4])  # transformers.models.bert.modeling_bert
        if missing_ok and path.startswith(MODELS) and module not in sys.modules:
            return None
        return original(path, missing_ok)

    return found
