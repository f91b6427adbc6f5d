"""peftsurgery: fine-tuning methods as graph surgery.

Every public name is here. They are looked up when they are first used, so that importing the
package (or asking the command for help) does not import torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from peftsurgery.offered import offer as _offer
from peftsurgery.uncollected import uncollected as _uncollected
from peftsurgery.version import __version__ as __version__

if TYPE_CHECKING:
    from peftsurgery.capture import GraphModel as GraphModel
    from peftsurgery.capture import capture as capture
    from peftsurgery.checkpoint.certificate import verify as verify
    from peftsurgery.checkpoint.merging import merge_adapters as merge_adapters
    from peftsurgery.checkpoint.unfolding import unfold_checkpoint as unfold_checkpoint
    from peftsurgery.diff.comparison import diff as diff
    from peftsurgery.errors import SurgeryError as SurgeryError
    from peftsurgery.formats.adapterhub.directory import from_adapterhub as from_adapterhub
    from peftsurgery.formats.adapterhub.directory import to_adapterhub as to_adapterhub
    from peftsurgery.formats.export_adapter import export_adapter as export_adapter
    from peftsurgery.formats.extraction import extract as extract
    from peftsurgery.formats.import_adapter import import_adapter as import_adapter
    from peftsurgery.formats.onnx.export import export_onnx as export_onnx
    from peftsurgery.formats.peft.directory import from_peft as from_peft
    from peftsurgery.formats.peft.directory import to_peft as to_peft
    from peftsurgery.formats.pretrained import fold_to_directory as fold_to_directory
    from peftsurgery.formats.pt2.export import export_pt2 as export_pt2
    from peftsurgery.formats.streamed_fold import fold_checkpoint as fold_checkpoint
    from peftsurgery.language.checking import check_rules as check_rules
    from peftsurgery.language.loading import load_rules as load_rules
    from peftsurgery.language.loading import parse_rules as parse_rules
    from peftsurgery.language.operators import operator as operator
    from peftsurgery.language.roles import role as role
    from peftsurgery.language.schema import Rule as Rule
    from peftsurgery.surgery.applying import apply as apply
    from peftsurgery.surgery.applying import eject as eject
    from peftsurgery.surgery.asking import sites as sites
    from peftsurgery.surgery.asking import why as why
    from peftsurgery.surgery.combine.combining import combine as combine
    from peftsurgery.surgery.fold.as_lora import as_lora as as_lora
    from peftsurgery.surgery.fold.flattening import flatten as flatten
    from peftsurgery.surgery.fold.folding import fold as fold
    from peftsurgery.surgery.fold.folding import fold_error as fold_error
    from peftsurgery.surgery.loading import load as load
    from peftsurgery.surgery.model.operated import OperatedModel as OperatedModel
    from peftsurgery.surgery.model.report import Report as Report
    from peftsurgery.training import AllocateRanks as AllocateRanks
    from peftsurgery.training import RankAllocator as RankAllocator
    from peftsurgery.training import lora_plus as lora_plus

_HOME = {
    "AllocateRanks": "training",
    "GraphModel": "capture",
    "OperatedModel": "surgery.model.operated",
    "RankAllocator": "training",
    "Report": "surgery.model.report",
    "Rule": "language.schema",
    "SurgeryError": "errors",
    "apply": "surgery.applying",
    "as_lora": "surgery.fold.as_lora",
    "capture": "capture",
    "check_rules": "language.checking",
    "combine": "surgery.combine.combining",
    "diff": "diff.comparison",
    "eject": "surgery.applying",
    "export_adapter": "formats.export_adapter",
    "export_onnx": "formats.onnx.export",
    "export_pt2": "formats.pt2.export",
    "extract": "formats.extraction",
    "flatten": "surgery.fold.flattening",
    "fold": "surgery.fold.folding",
    "fold_checkpoint": "formats.streamed_fold",
    "fold_error": "surgery.fold.folding",
    "fold_to_directory": "formats.pretrained",
    "from_adapterhub": "formats.adapterhub.directory",
    "from_peft": "formats.peft.directory",
    "import_adapter": "formats.import_adapter",
    "load": "surgery.loading",
    "load_rules": "language.loading",
    "lora_plus": "training",
    "merge_adapters": "checkpoint.merging",
    "operator": "language.operators",
    "parse_rules": "language.loading",
    "role": "language.roles",
    "sites": "surgery.asking",
    "to_adapterhub": "formats.adapterhub.directory",
    "to_peft": "formats.peft.directory",
    "unfold_checkpoint": "checkpoint.unfolding",
    "verify": "checkpoint.certificate",
    "why": "surgery.asking",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _uncollected():
        home = importlib.import_module(f"{__name__}.{_HOME[name]}")
    return getattr(home, name)


_offer("diff", lambda: __getattr__("diff"))


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _Api(ModuleType):
    """The import system binds a subpackage to its name here; a public name keeps its meaning.

    Without this, ``ps.capture`` would be the function until somebody imports the subpackage
    ``peftsurgery.capture``, and a module from then on.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Api
