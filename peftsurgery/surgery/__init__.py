"""Surgery: rules applied to a captured model, taken out again, or folded into its weights."""

from .applying import apply, check_taken, eject, load, open_base, open_model, operate
from .bases import check_adapter_base
from .combining import combine
from .flattening import flatten
from .folding import fold, fold_error
from .fusing import fused_names
from .operated import OperatedModel
from .operation import Cut, Operation, adapter_name
from .provenance import check_places
from .report import Report
from .selecting import select_cuts
from .switching import check_left_out

__all__ = [
    "Cut",
    "OperatedModel",
    "Operation",
    "Report",
    "adapter_name",
    "apply",
    "check_adapter_base",
    "check_left_out",
    "check_places",
    "check_taken",
    "combine",
    "eject",
    "flatten",
    "fold",
    "fold_error",
    "fused_names",
    "load",
    "open_base",
    "open_model",
    "operate",
    "select_cuts",
]
