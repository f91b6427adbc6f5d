"""torch.export, asked so that nothing is baked in that may change: a flat graph of ATen operators.

The export runs in train mode, since an eval export loses attention's dropout for good; clean-up
makes every dropout follow the module's own ``training``. Some models do more in training than their
operators tell (paths or layers dropped at random, router jitter): they are exported once per mode.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from peftsurgery.capture.attributes import kept_attributes
from peftsurgery.capture.decided import Decision, Decisions, is_by_value
from peftsurgery.capture.equal_blocks.traced_once import Once, traced_once
from peftsurgery.capture.equal_blocks.unfolding import Filling, unfold
from peftsurgery.capture.free_sizes import (
    TangledSizesError,
    check_sizes,
    dynamic_shapes,
    has_free_images,
)
from peftsurgery.capture.higher_order import inline_regions
from peftsurgery.capture.loops.folding import fold_loops
from peftsurgery.capture.loops.traced import LoopError, Loops, Place
from peftsurgery.capture.masks import Masks
from peftsurgery.capture.model_lines import said_where
from peftsurgery.capture.modes import Reads, noted_reads
from peftsurgery.capture.module_calls import Notes
from peftsurgery.capture.prepared import prepared
from peftsurgery.capture.randomness import drawn_elsewhere, is_random, kept_generators, starts
from peftsurgery.capture.recording import Record, Watch, is_steady, recorded
from peftsurgery.capture.signature import Call, apart, traced
from peftsurgery.capture.sizes import size_conditions
from peftsurgery.capture.stack import stack_paths
from peftsurgery.capture.uncompiled import uncompiled
from peftsurgery.errors import SurgeryError, first_line
from peftsurgery.quiet import quiet

# What torch.export raises for a model it cannot trace: its own errors derive from these.
EXPORT_ERRORS = (
    *(RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError),
    AssertionError,
)


@dataclass(frozen=True)
class Freedom:
    """What a trace leaves free: sizes of ``images``, and how many turns loops have.

    ``steps`` are the places of those that are traced step by step; None stands for all.
    """

    images: bool
    steps: frozenset[Place] | None = frozenset()

    def with_steps(self, places: frozenset[Place]) -> frozenset[Place] | None:
        """The places with more; all if there is nothing new to leave out."""
        known = self.steps or frozenset()
        return None if self.steps is None or places <= known else known | places


@dataclass(frozen=True)
class Exported:
    """A flat exported graph, whose placeholders are the call's values in order.

    ``conditions`` are what it assumes of their sizes,
    ``mode`` is the value of ``training`` it is right for, or None if it follows train() and eval().
    ``filled`` are the paths of the blocks that were filled in, as an equal one was traced, and
    ``decisions`` are what it assumes of its inputs' values.
    """

    module: fx.GraphModule
    output: pytree.TreeSpec
    conditions: tuple[str, ...]
    mode: bool | None
    filled: tuple[str, ...]
    decisions: tuple[Decision, ...] = ()


@quiet()
@uncompiled()
def export(
    module: nn.Module,
    call: Call,
    training: bool,
    notes: Notes,
    once: bool = True,
    likely: Collection[str] = (),
) -> Exported:
    """Export ``module`` for ``call``, for both modes if one graph can serve them, else for one.

    ``notes`` are those of its modules' calls. Equal blocks are traced ``once``; ``likely`` are the
    paths of those that another capture filled in.

    Raises PSG201 with torch.export's reason if it cannot be exported, and PSG211 if it is only the
    train mode that cannot, and a capture for ``training`` is wanted; PSG210 for a cache that cannot
    be left to its owner, and PSG217 for a model that remembers, in the mode that is wanted.
    """
    call = traced(apart(call), module)
    make = partial(_exported, module, call, training, notes, once, likely)
    free = Freedom(has_free_images(module, call.tensors))
    while True:
        try:
            if free.images:
                with contextlib.suppress(TangledSizesError, SurgeryError):
                    return make(free)
                free = replace(free, images=False)
            return make(free)
        except LoopError as error:
            free = replace(free, steps=free.with_steps(error.places))


def _exported(
    module: nn.Module,
    call: Call,
    training: bool,
    notes: Notes,
    once: bool,
    likely: Collection[str],
    free: Freedom,
) -> Exported:
    """Export ``module`` with as much ``free``.

    Raises TangledSizesError for images whose sizes had better be fixed, LoopError for loops.
    """
    if likely:
        with contextlib.suppress(*EXPORT_ERRORS, SurgeryError):
            known = _export(module, call, notes, likely, True, free)
            if _serves_both(known, module, call):
                return _read(known, call)
    trace = partial(_try, module, call, notes, () if once else None, free=free)
    trained, refusal = trace(train=True)
    if trained is not None:
        if _serves_both(trained, module, call):
            return _read(trained, call)
        if training:
            return replace(_read(trained, call), mode=True)
    evaluated, reason = trace(train=False)
    name = type(module).__name__
    for error in (reason, refusal if training else None):
        if isinstance(error, SurgeryError):
            raise error
    if evaluated is None:
        raise _refused(name, reason, module) from reason
    if training:
        raise SurgeryError(
            "PSG211",
            f"{name} cannot be captured in train mode: {first_line(refusal)}"
            f"{said_where(refusal, module)}",
        ) from refusal
    return replace(_read(evaluated, call), mode=False)


def _refused(name: str, reason: Exception | None, module: nn.Module) -> SurgeryError:
    """The refusal of a module that torch.export cannot trace."""
    where = said_where(reason, module)
    if not is_by_value(reason):
        return SurgeryError("PSG201", f"{name} cannot be captured: {first_line(reason)}{where}")
    message = f"{name} cannot be captured: its code goes by values that it computes{where}"
    return SurgeryError("PSG228", message)


@dataclass(frozen=True)
class _Trace:
    """What came of tracing a call in one mode."""

    program: ExportedProgram
    record: Record
    reads: Reads
    masks: Masks
    fillings: Sequence[Filling]  # calls of blocks whose steps are not in the record
    decisions: tuple[Decision, ...]
    loops: Loops


def _try(
    module: nn.Module,
    call: Call,
    notes: Notes,
    likely: Collection[str] | None,
    train: bool,
    free: Freedom,
) -> tuple[_Trace | None, Exception | None]:
    """What torch.export makes of the call in one mode, or why it cannot.

    What cannot be exported with equal blocks traced once may be, with each traced by itself; and
    what decides by values, with those of the call.
    """
    try:
        return _export(module, call, notes, likely, train, free), None
    except SurgeryError as error:
        return None, error
    except EXPORT_ERRORS as error:
        if likely is not None:
            return _try(module, call, notes, None, train, free)
        if not is_by_value(error):
            return None, error
    try:
        return _export(module, call, notes, None, train, free, decided=True), None
    except (*EXPORT_ERRORS, SurgeryError) as error:
        return None, error


def _read(trace: _Trace, call: Call) -> Exported:
    program = trace.program
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    inline_regions(module)
    unfold(module.graph, trace.fillings)
    with trace.loops.placed():
        fold_loops(module.graph)
    conditions = size_conditions(module.graph, program.range_constraints)
    if call.trace is not None:
        conditions = call.trace.conditions(conditions)
        call.trace.connect(module.graph)
    conditions = tuple(dict.fromkeys((*conditions, *trace.masks.conditions)))
    filled = tuple(filling.place.noted_path for filling in trace.fillings)
    out = program.call_spec.out_spec
    return Exported(module, out, conditions, None, filled, trace.decisions)


def _serves_both(trained: _Trace, module: nn.Module, call: Call) -> bool:
    """Whether a train-mode graph serves eval mode too once its train flags are off.

    Modules of torch do nothing else in eval mode. If other code chooses rates by the mode or drops
    something by itself, the module is run in eval mode, without values, and compared.
    """
    if trained.reads.decides:
        return False
    if not trained.reads.rates and all(
        _is_in_dropout_module(node, module)
        for node in trained.program.graph.nodes
        if is_random(node.target, node.args, node.kwargs)
    ):
        return True
    try:
        decided = bool(trained.decisions)
        record = partial(_record, module, call, by_value=trained.masks.by_value, decided=decided)
        is_short = trained.fillings or trained.loops.begun
        known = record(True) if is_short else trained.record
        return record(False).is_off_of(known)
    except (*EXPORT_ERRORS, SurgeryError):
        return False


def _is_in_dropout_module(node: fx.Node, module: nn.Module) -> bool:
    paths = stack_paths(node)
    return bool(paths) and isinstance(
        module.get_submodule(paths[-1][1]), nn.modules.dropout._DropoutNd
    )


def _export(
    module: nn.Module,
    call: Call,
    notes: Notes,
    likely: Collection[str] | None,
    train: bool,
    free: Freedom,
    by_value: bool = False,
    decided: bool = False,
) -> _Trace:
    """Trace a call; equal blocks once, unless ``likely`` is None; values ``decided`` by it."""
    watch, masks = Watch(module), Masks(call, by_value)
    watch.loops = loops = Loops(module, free.steps)
    if free.images:
        watch.check = check_sizes
    if decided:
        watch.decisions = Decisions(module, call.tensors)
    blocks = None if likely is None else Once(module, notes, masks, likely)
    if blocks is not None:
        watch.guard = blocks.hidden.guarded
    with (
        kept_attributes(module),
        prepared(module, call, train, watch, masks),
        noted_reads() as reads,
        contextlib.nullcontext() if blocks is None else traced_once(blocks),
        contextlib.nullcontext() if blocks is None else blocks.hidden.kept(),
        _unprinted(),
        loops.kept(),
    ):
        before = drawn_elsewhere()
        program = torch.export.export(
            module,
            args=(),
            kwargs=dict(call.tensors),
            strict=False,
            dynamic_shapes=dynamic_shapes(dict(call.tensors), free.images),
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        drew = drawn_elsewhere() != before
    if masks.matters:
        return _export(module, call, notes, likely, train, free, True, decided)
    if drew and not _is_one(_record(module, call, train, start) for start in starts()):
        raise ValueError("what it computes depends on random numbers of Python or numpy")
    if watch.changed:
        with kept_attributes(module), prepared(module, call, train):
            if not is_steady(module, call):
                raise _remembering(module, watch.changed[0])
    fillings = () if blocks is None else blocks.fillings
    decisions = () if watch.decisions is None else tuple(watch.decisions.taken)
    return _Trace(program, watch.record, reads, masks, fillings, decisions, loops)


def _is_one(records: Iterable[Record]) -> bool:
    """Whether all runs did the same."""
    return all(one == other for one, other in pairwise(records))


def _remembering(module: nn.Module, attribute: str) -> SurgeryError:
    """The refusal of a module whose calls depend on those before."""
    return SurgeryError(
        "PSG217",
        f"what {type(module).__name__} computes depends on its calls before: its forward sets "
        f"'{attribute}'",
        "call the model once in this mode before capturing it, if it does so only once; register "
        "what it remembers as a buffer",
    )


def _record(
    module: nn.Module,
    call: Call,
    train: bool,
    start: tuple[int, ...] | None = None,
    by_value: bool = False,
    decided: bool = False,
) -> Record:
    """What the module does for a call in one mode."""
    masks = Masks(call, by_value)
    ready = prepared(module, call, train, None, masks)
    with kept_attributes(module), ready, kept_generators(start):
        return recorded(module, call, decided)


@contextlib.contextmanager
def _unprinted() -> Iterator[None]:
    """Keep torch.export from printing the graph it has so far, before it raises why it ends.

    What it knows of an export that is under way around this one is put back.
    """
    names: dict[str, Any] = vars(importlib.import_module("torch.export._trace"))
    known = ("_EXPORT_FLAGS", "_EXPORT_MODULE_HIERARCHY")
    before = {name: names[name] for name in known if name in names}
    names["print"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        names.pop("print", None)
        names.update(before)
