"""GraphModel: a captured model, called like the model it came from.

It captures once per signature, when a call first needs it, and runs every capture over the same
parameters. An operated model is a GraphModel too: it turns each fresh capture into the
operated one, so inputs nobody thought of when the rules were applied (labels, embeddings) work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from peftsurgery.arguments import checked
from peftsurgery.capture.captures import Capture, Captures, Casts
from peftsurgery.capture.classes import become_like
from peftsurgery.capture.derived_inputs import with_derived
from peftsurgery.capture.factories import Inputs
from peftsurgery.capture.generating import (
    check_generates,
    first_inputs,
    new_cache,
    remembers,
    shell,
)
from peftsurgery.capture.inputs import example_inputs
from peftsurgery.capture.kv_cache import Past
from peftsurgery.capture.modules import Block, mirror, own
from peftsurgery.capture.original_api import Likeness, forward_like, loaded_from
from peftsurgery.capture.plain import is_plain_call
from peftsurgery.capture.serving import Serving
from peftsurgery.capture.signature import Call, bind_call, with_cache, with_own_name
from peftsurgery.capture.sources import Source, check_plain, open_source
from peftsurgery.capture.surroundings import outside, surroundings
from peftsurgery.capture.tensors import named_tensors, owner_of, parameters_of, tensor_at
from peftsurgery.capture.threads import GATE, making
from peftsurgery.capture.waiting import Waiting
from peftsurgery.capture.watched import original_at
from peftsurgery.errors import SurgeryError
from peftsurgery.notebook import notes, shown, table
from peftsurgery.uncollected import uncollected


class GraphModel(Likeness):
    """Captured model: a module that runs graphs in place of the original's forwards.

    Called like the original, it returns what that returns. It captures once for each signature
    (ids or embeddings, labels or none, cache or none), when a call first needs it, over the same
    parameters. Parts keep the original's names and classes.
    """

    config: Any
    generation_config: Any

    def __init__(
        self,
        captures: Captures,
        parameter: Callable[[nn.Parameter], nn.Parameter] = own,
    ) -> None:
        """``parameter`` makes this model's parameters of the source's."""
        super().__init__(captures.infos[""])
        original = captures.source.module
        classes: tuple[Any, Any] = type(self), type(original)
        become_like(self, original, {"forward": forward_like(*classes)})
        self._captures = captures
        self._serving = Serving()
        with making():
            mirror(captures.source.module, self, captures.blocks, captures.infos, parameter)
        self._waiting = Waiting(self)
        self._bound = not captures.source.on_meta
        # by part and not by its table of tensors, which torch.export puts another in the place of
        self._watched: list[tuple[str, nn.Module, str, str, torch.dtype]] = [
            (name, part, "_parameters" if info.parameter else "_buffers", leaf, info.dtype)
            for name, info in captures.tensors.items()
            for part, leaf in [owner_of(self, name)]
        ]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original returns for these arguments, in the original's type.

        What a model remembers for the next call (its cache) is left out, as with
        ``use_cache=False``, unless the call asks for it or the model was captured with a cache.
        """
        self.bind()
        call = self.call_of(*args, **kwargs)
        capture = self._find(call)
        return capture.returned(self.run(capture, call.leaves))

    def run(self, capture: Capture, leaves: Sequence[Any]) -> Any:
        """Run a capture on a call's leaf values.

        Returns its outputs, flat, in the graph's order.
        """
        program = self.runnable(self._waiting.serve(self, capture).top)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        recorded = torch.is_grad_enabled() or not is_plain_call(tensors)
        forward = program.forward if recorded else program.no_grad
        if torch.compiler.is_dynamo_compiling() or not any(each.is_cpu for each in tensors):
            return forward(self, *leaves)
        GATE.enter()
        try:
            return forward(self, *leaves)
        finally:
            GATE.leave()

    def capture_for(self, *args: Any, **kwargs: Any) -> Capture:
        """The capture that serves a call of these arguments, as this model runs it."""
        return self._find(self.call_of(*args, **kwargs))

    def call_of(self, *args: Any, **kwargs: Any) -> Call:
        """Bind arguments by name, and add a new cache where one is wanted and none is given.

        Blocks that are recomputed would remember twice: they remember nothing, as the original's.
        """
        module, own = self._captures.source.module, self._captures.past
        call = with_derived(with_own_name(bind_call(module, args, kwargs), module, own), module)
        wanted = call.flags.get("use_cache", self._captures.cache and not self.training)
        is_recomputed = self.training and self.is_gradient_checkpointing
        if call.past is not None and not is_recomputed:
            return call
        if own is None or not (wanted or call.past) or not remembers(module):
            return call
        if is_recomputed:
            flags = {name: flag for name, flag in call.flags.items() if name != "use_cache"}
            return replace(call, flags=flags, past=None)
        call = with_cache(call, Past(own, new_cache(module)))
        return replace(call, flags={**call.flags, "use_cache": True})

    def _find(self, call: Call) -> Capture:
        """The capture that serves a call, as this model runs it."""
        return self._served(self.original_capture(call))

    def original_capture(self, call: Call) -> Capture:
        """The capture that serves a call, as the original runs it."""
        return self._captures.find(call, self.training, self._casts())

    @property
    def captures(self) -> tuple[Capture, ...]:
        """The captures served so far, the one the model was made with first."""
        return self._serving.captures(None)

    @property
    def base_capture(self) -> Capture:
        """The capture that was made first, before any operation: the one rules are applied to."""
        return self._captures.first

    @property
    def source(self) -> Source:
        """Source of the model and of its weights."""
        return self._captures.source

    def read_from(self) -> Iterator[str | Path | None]:
        """The places of a model's base: its directory, and that of its tokenizer if it has two."""
        source = self.source
        yield from (source.origin, source.folder, loaded_from(source), source.build.tokenizer)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The tokens that the original's ``generate`` gives, by the original's own code.

        What has not been captured yet is captured now. PSG212 unless the original is a causal
        language model; PSG210 for a cache that a capture cannot leave to its owner.
        """
        return self.writer(self).generate(*args, **kwargs)

    def writer(self, call: Callable[..., Any]) -> PreTrainedModel:
        """A generator of the original's class whose forward is ``call``."""
        self.bind()
        with making():
            return shell(self._captures.source.module, self, call)

    def _served(self, capture: Capture, mode: Any = None) -> Capture:
        """Make a capture runnable: transform it once, and give the blocks their programs.

        ``mode`` is what a call chooses; a captured model has nothing to choose from.
        """
        return self._serving.ready(mode, capture, partial(self._equipped, capture, mode))

    def _transformed(self, capture: Capture, mode: Any) -> Capture:
        """A fresh capture as this model runs it; an operated model replays its operations here."""
        return capture

    def _equipped(self, capture: Capture, mode: Any) -> Capture:
        """A transformed capture whose programs the blocks have, and whose constants are here."""
        with uncollected():
            ready = outside(lambda: self._transformed(capture, mode), capture.state)
        for path, programs in ready.programs.items():
            if path:
                block = original_at(self, path)
                assert isinstance(block, Block)
                block.programs = {**block.programs, **{each.label: each for each in programs}}
        self._take_constants()
        return ready

    @property
    def is_bound(self) -> bool:
        """Whether the model has its weights."""
        return self._bound

    def bind(self) -> None:
        """Read the weights now if the model was captured without them; PSG207 if there are none."""
        if self._bound:
            return
        with making():
            if not self._bound:
                self._read_weights()
                self._bound = True

    def _read_weights(self) -> None:
        loaded = dict(named_tensors(self._captures.source.weights()))
        for name, tensor in named_tensors(self):
            if tensor.is_meta and name in loaded:
                _fill(self, name, tensor, loaded[name].detach())

    def get_parameter(self, target: str) -> Any:
        """A parameter by its name; its value, if that is computed of others (parametrised, pruned).

        The name is that in the capture, whatever module is in a part's place.
        """
        owner, _, leaf = target.rpartition(".")
        part = original_at(self, owner)
        own = part._parameters.get(leaf)
        if own is None and parameters_of(part, leaf):
            return getattr(part, leaf)
        return super().get_parameter(target) if own is None else own

    def check_in_place(self) -> None:
        """Refuse to save or fold a model with a replaced submodule. Raises PSG220."""
        path = self._waiting.replaced(self)
        if path is not None:
            message = f"another module is in the place of '{path}', which the capture does not have"
            raise SurgeryError("PSG220", message, "put the part itself in its place again")

    def _casts(self) -> Casts:
        """The original's tensors that were cast since (by ``to(torch.bfloat16)``, say)."""
        try:  # most calls: all are in their places, in the dtypes that they had
            found = [
                (name, part.__dict__[table][leaf])
                for name, part, table, leaf, dtype in self._watched
                if part.__dict__[table][leaf].dtype is not dtype
            ]
        except (KeyError, AttributeError):  # parametrised, pruned
            found = [
                (name, tensor_at(part, table, leaf)) for name, part, table, leaf, _ in self._watched
            ]
        dtypes = self._captures.tensors
        return frozenset(
            (name, tensor.dtype)
            for name, tensor in found
            if tensor.dtype != dtypes[name].dtype and _is_cast(tensor)
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self.bind()
        super()._apply(fn, recurse)
        self._take_constants()
        return self

    def _take_constants(self) -> None:
        """Hold the constants of all captures on this model's device, in the dtype they have."""
        tensors = [*self.parameters(), *self.buffers()]
        for name, value in self._captures.constants.items():
            here = value if not tensors or tensors[0].is_meta else value.to(tensors[0].device)
            self.register_buffer(name, here, persistent=False)

    def _repr_html_(self) -> str:
        """What a notebook shows: the blocks, those of equal structure in one row."""
        programs = self.base_capture.programs
        alike: dict[tuple[str, ...], list[str]] = {}
        for path in filter(None, programs):
            key = (path.rpartition(".")[0], *(program.label for program in programs[path]))
            alike.setdefault(key, []).append(path)
        rows = [
            (
                " … ".join(dict.fromkeys((paths[0], paths[-1]))),
                programs[paths[0]][0].kind,
                len(paths),
            )
            for paths in alike.values()
        ]
        total = sum(parameter.numel() for parameter in self.parameters())
        return shown(
            f"{self._shown_name()}: {total:,} parameters",
            table(("blocks", "class", "count"), rows),
            notes(self.base_capture.notes),
        )

    def _shown_name(self) -> str:
        return f"GraphModel[{self._info.type}]"


@checked
def capture(
    model: nn.Module | str | Path,
    inputs: Inputs | None = None,
    cache: bool = False,
) -> GraphModel:
    """Capture a model as graphs.

    ``model`` is a live module, or what the command line takes for MODEL (a directory, a hub id,
    ``package.module:factory``), which is captured on the meta device. ``inputs`` are example
    arguments, a tuple or a dict, with a batch of at least 2; a transformers model needs none, nor
    does a factory that returns ``(module, inputs)``.
    With ``cache``, a causal language model returns what it remembers from every call in eval mode,
    and what ``generate`` calls first is captured now; without, both are done when they are asked
    for. Raises PSG201 if the model cannot be exported, PSG202 if it needs inputs, PSG212 if it
    does not generate, PSG210 if its cache is no ordinary one.
    """
    state = surroundings().without_autocast()
    with making():
        source = outside(lambda: _source(model), state)
    return capture_source(source, inputs, cache)


def capture_source(
    source: Source,
    inputs: Inputs | None = None,
    cache: bool = False,
) -> GraphModel:
    """Capture the module of a source; see :func:`capture`."""
    state = surroundings().without_autocast()
    with making():
        return outside(lambda: _captured(source, inputs, cache), state)


def _source(model: nn.Module | str | Path) -> Source:
    return Source(model) if isinstance(model, nn.Module) else open_source(str(model))


def _captured(source: Source, inputs: Inputs | None, cache: bool) -> GraphModel:
    check_plain(source.module)
    if cache:
        check_generates(source.module)
    given = source.inputs if inputs is None else inputs
    graph_model = GraphModel(Captures(source, cache, shared=given is None and not cache))
    example = _made_inputs(source) if given is None else given
    args, kwargs = ((), example) if isinstance(example, Mapping) else (example, {})
    with _saying_what_was_tried(kwargs if given is None else {}):
        call = bind_call(source.module, args, kwargs)
        graph_model._find(with_derived(call, source.module))
    if cache:
        graph_model.original_capture(graph_model.call_of(**first_inputs(source.module)))
    return graph_model


def capture_again(model: GraphModel, source: Source) -> GraphModel:
    """The graphs of another source, whose module is called as the first capture's was."""
    with making():
        graph_model = GraphModel(Captures(source, model._captures.cache))
        graph_model._find(model.base_capture.call)
        if model._captures.cache:
            graph_model.original_capture(graph_model.call_of(**first_inputs(source.module)))
    return graph_model


def _made_inputs(source: Source) -> Mapping[str, Any]:
    module = source.module
    if not isinstance(module, PreTrainedModel):
        message = f"example inputs are needed to capture a {type(module).__name__}"
        hint = "capture(module, inputs=(x,)) or capture(module, inputs={'x': x})"
        if source.origin is not None:
            hint = f"let {source.origin} return (module, inputs): a tuple, or a dict by name"
        raise SurgeryError("PSG202", message, hint)
    return example_inputs(module)


@contextmanager
def _saying_what_was_tried(made: Mapping[str, Any]) -> Iterator[None]:
    """Name the example inputs that were made, if the model cannot be exported with them."""
    try:
        yield
    except SurgeryError as error:
        if error.code != "PSG201" or error.hint is not None or not made:
            raise
        hint = f"it was called with {', '.join(made)}; give what it needs: inputs={{...}}"
        raise SurgeryError(error.code, error.message, hint, error.where) from error


def _is_cast(tensor: torch.Tensor) -> bool:
    """Whether a tensor of another dtype than the original's still holds its values."""
    return tensor.is_floating_point() or tensor.is_complex()


def _fill(module: nn.Module, name: str, blank: torch.Tensor, value: torch.Tensor) -> None:
    """Give a tensor without weights its value.

    A parameter stays the same Python object, so ties and optimizers made before keep hold of it.
    """
    if isinstance(blank, nn.Parameter):
        torch.utils.swap_tensors(blank, nn.Parameter(value, requires_grad=blank.requires_grad))
        return
    part, leaf = owner_of(module, name)
    part._buffers[leaf] = value
