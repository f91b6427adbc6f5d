"""torch.export, asked so that nothing is baked in that may change: a flat graph of ATen operators.

The export runs in train mode, since an eval export loses attention's dropout for good; clean-up
makes every dropout follow the module's own ``training``. Some models do more in training than their
operators tell (paths or layers dropped at random, router jitter): they are exported once per mode.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.fx.experimental import _config as fx_config
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel
from transformers.exporters.exporter_dynamo import (
    patch_model_config,
    register_cache_pytrees_for_model,
    reset_model_state,
)
from transformers.exporters.utils import patch_attribute

from peftsurgery.capture.attributes import kept_attributes
from peftsurgery.capture.equal_blocks.traced_once import Once, traced_once
from peftsurgery.capture.equal_blocks.unfolding import Filling, unfold
from peftsurgery.capture.free_sizes import (
    TangledSizesError,
    check_sizes,
    dynamic_shapes,
    has_free_images,
)
from peftsurgery.capture.higher_order import inline_regions
from peftsurgery.capture.kv_cache import as_if_run
from peftsurgery.capture.masks import Masks
from peftsurgery.capture.model_lines import said_where
from peftsurgery.capture.modes import Reads, noted_reads
from peftsurgery.capture.module_calls import Notes
from peftsurgery.capture.patches import patched
from peftsurgery.capture.randomness import drawn_elsewhere, is_random, kept_generators, starts
from peftsurgery.capture.recording import Record, Watch, is_steady, recorded
from peftsurgery.capture.signature import Call, apart, stand_for, traced
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
class Exported:
    """A flat exported graph, whose placeholders are the call's values in order.

    ``conditions`` are what it assumes of their sizes,
    ``mode`` is the value of ``training`` it is right for, or None if it follows train() and eval().
    ``filled`` are the paths of the blocks that were filled in, as an equal one was traced.
    """

    module: fx.GraphModule
    output: pytree.TreeSpec
    conditions: tuple[str, ...]
    mode: bool | None
    filled: tuple[str, ...]


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
    if has_free_images(module, call.tensors):
        with contextlib.suppress(TangledSizesError, SurgeryError):
            return make(images_vary=True)
    return make(images_vary=False)


def _exported(
    module: nn.Module,
    call: Call,
    training: bool,
    notes: Notes,
    once: bool,
    likely: Collection[str],
    images_vary: bool,
) -> Exported:
    """Export ``module`` with images of free sizes or of those of the call.

    Raises TangledSizesError for images whose sizes had better be fixed.
    """
    if likely:
        with contextlib.suppress(*EXPORT_ERRORS, SurgeryError):
            known = _export(module, call, notes, likely, True, images_vary)
            if _serves_both(known, module, call):
                return _read(known, call)
    trace = partial(_try, module, call, notes, () if once else None, images_vary=images_vary)
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
        why = first_line(reason) + said_where(reason, module)
        raise SurgeryError("PSG201", f"{name} cannot be captured: {why}") from reason
    if training:
        raise SurgeryError(
            "PSG211",
            f"{name} cannot be captured in train mode: {first_line(refusal)}"
            f"{said_where(refusal, module)}",
        ) from refusal
    return replace(_read(evaluated, call), mode=False)


@dataclass(frozen=True)
class _Trace:
    """What came of tracing a call in one mode."""

    program: ExportedProgram
    record: Record
    reads: Reads
    masks: Masks
    fillings: Sequence[Filling]  # calls of blocks whose steps are not in the record


def _try(
    module: nn.Module,
    call: Call,
    notes: Notes,
    likely: Collection[str] | None,
    train: bool,
    images_vary: bool,
) -> tuple[_Trace | None, Exception | None]:
    """What torch.export makes of the call in one mode, or why it cannot.

    What cannot be exported with equal blocks traced once may be, with each traced by itself.
    """
    try:
        return _export(module, call, notes, likely, train, images_vary), None
    except SurgeryError as error:
        return None, error
    except EXPORT_ERRORS as error:
        if likely is None:
            return None, error
        return _try(module, call, notes, None, train, images_vary)


def _read(trace: _Trace, call: Call) -> Exported:
    program = trace.program
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    inline_regions(module)
    unfold(module.graph, trace.fillings)
    conditions = size_conditions(module.graph, program.range_constraints)
    if call.trace is not None:
        conditions = call.trace.conditions(conditions)
        call.trace.connect(module.graph)
    conditions = tuple(dict.fromkeys((*conditions, *trace.masks.conditions)))
    filled = tuple(filling.place.noted_path for filling in trace.fillings)
    return Exported(module, program.call_spec.out_spec, conditions, None, filled)


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
        record = partial(_record, module, call, by_value=trained.masks.by_value)
        known = record(True) if trained.fillings else trained.record
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
    images_vary: bool,
    by_value: bool = False,
) -> _Trace:
    """Trace a call; equal blocks once, unless ``likely`` is None."""
    watch, masks = Watch(module), Masks(call, by_value)
    if images_vary:
        watch.check = check_sizes
    blocks = None if likely is None else Once(module, notes, masks, likely)
    if blocks is not None:
        watch.guard = blocks.hidden.guarded
    with (
        kept_attributes(module),
        _prepared(module, call, train, watch, masks),
        noted_reads() as reads,
        contextlib.nullcontext() if blocks is None else traced_once(blocks),
        contextlib.nullcontext() if blocks is None else blocks.hidden.kept(),
        _unprinted(),
    ):
        before = drawn_elsewhere()
        program = torch.export.export(
            module,
            args=(),
            kwargs=dict(call.tensors),
            strict=False,
            dynamic_shapes=dynamic_shapes(dict(call.tensors), images_vary),
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        drew = drawn_elsewhere() != before
    if masks.matters:
        return _export(module, call, notes, likely, train, images_vary, by_value=True)
    if drew and not _is_one(_record(module, call, train, start) for start in starts()):
        raise ValueError("what it computes depends on random numbers of Python or numpy")
    if watch.changed:
        with kept_attributes(module), _prepared(module, call, train):
            if not is_steady(module, call):
                raise _remembering(module, watch.changed[0])
    fillings = () if blocks is None else blocks.fillings
    return _Trace(program, watch.record, reads, masks, fillings)


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
) -> Record:
    """What the module does for a call in one mode."""
    masks = Masks(call, by_value)
    prepared = _prepared(module, call, train, None, masks)
    with kept_attributes(module), prepared, kept_generators(start):
        return recorded(module, call)


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


@contextlib.contextmanager
def _prepared(
    module: nn.Module,
    call: Call,
    train: bool,
    watch: Watch | None = None,
    masks: Masks | None = None,
) -> Iterator[None]:
    """Everything a faithful export needs, undone on leaving; ``watch`` notes what forward does."""
    flags = dict(call.flags)
    with contextlib.ExitStack() as stack:
        if isinstance(module, PreTrainedModel):
            register_cache_pytrees_for_model(module)
            stack.enter_context(patched(module))
            stack.enter_context(reset_model_state(module))
            stack.enter_context((masks or Masks(call)).traced())
            if call.trace is None:
                stack.enter_context(patch_model_config(module, {"use_cache": False}))
            else:
                stack.enter_context(as_if_run())
        stack.enter_context(kept_generators())
        module.train(train)
        # a size of one is a size like others, and a decision on it a condition of the capture
        stack.enter_context(patch_attribute(fx_config, "backed_size_oblivious", lambda _: True))
        stack.enter_context(without_fast_path())
        stack.enter_context(_explicit_forward(module, call, flags, watch))
        stack.enter_context(torch.enable_grad())
        yield


@contextlib.contextmanager
def without_fast_path() -> Iterator[None]:
    """nn.TransformerEncoder's fast path is one opaque operator: no linears to see, none in ONNX."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _explicit_forward(
    module: nn.Module, call: Call, flags: dict[str, Any], watch: Watch | None
) -> Iterator[None]:
    """Give the module a forward that takes exactly the call's tensors; flags are fixed in it."""
    original: Callable[..., Any] = module.forward

    def plain(**tensors: Any) -> Any:
        if call.trace is not None:
            return call.trace.run(original, tensors, **flags)
        return original(**tensors, **flags)

    def forward(**tensors: Any) -> Any:
        if watch is None:
            return plain(**tensors)
        mode: Any = detect_fake_mode()
        mode.cache_enabled = False  # few steps are like another: what a trace keeps costs more
        return watch.run(plain, **tensors)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind, default=None) for name in call.tensors]
    _declare(forward, inspect.Signature(parameters))
    stand_for(forward, original)
    had_own = "forward" in vars(module)
    module.forward = forward
    try:
        yield
    finally:
        if had_own:
            module.forward = original
        else:
            del module.forward


def _declare(function: Any, signature: inspect.Signature) -> None:
    """Let a function say that it takes these parameters; torch.export asks it."""
    function.__signature__ = signature
