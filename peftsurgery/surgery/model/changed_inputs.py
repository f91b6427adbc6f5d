"""Changed inputs: adapters that rewrite a model's inputs, and the captures that allow it.

Such a capture (:mod:`peftsurgery.capture.changeable_inputs`) is that of embeddings with the
embedding's own nodes before it. While an adapter that changes the inputs is active, every call is
served by one; a call whose inputs are changed already is served by an ordinary capture, in which
the cuts at the inputs are not made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn

from peftsurgery.anatomy.inputs import embedded
from peftsurgery.anatomy.model_arguments import ARGUMENTS, TOKENS
from peftsurgery.capture import Capture
from peftsurgery.capture.changeable_inputs import (
    ChangeableInputs,
    as_given,
    call_behind,
    computed_from,
)
from peftsurgery.capture.copying import SharedByCopies
from peftsurgery.capture.signature import Call, takes
from peftsurgery.capture.threads import known_or_made, making
from peftsurgery.errors import SurgeryError
from peftsurgery.surgery.plan.cut import Cut, Operation
from peftsurgery.surgery.plan.mode import Mode
from peftsurgery.surgery.rewrite.inputs import bound_names, changes_inputs, new_shapes

Find = Callable[[Call], Capture]
Shapes = Mapping[str, Sequence[int]]


@dataclass(eq=False)
class ChangedInputs(SharedByCopies):
    """Captures with rewritable inputs, made when they are first needed.

    ``names`` are the inputs that the rules of the ``adapters`` rewrite or read; no adapter at all
    is the usual case. ``find``, where it is asked for, gives the capture that serves a call of the
    model behind. A capture has several versions if inputs of other sizes need other programs.
    """

    module: nn.Module
    names: frozenset[str]
    adapters: frozenset[str]
    _versions: dict[int, list[ChangeableInputs]] = field(default_factory=dict)
    _made: dict[int, ChangeableInputs] = field(default_factory=dict)

    @classmethod
    def of(cls, operations: Iterable[Operation], module: nn.Module) -> ChangedInputs:
        """Collect what operations change of the inputs of ``module``, the original model."""
        rules = [
            (operation.name, rule)
            for operation in operations
            for rule in operation.file.rules
            if rule.kind.is_inputs and rule.applies(operation.settings)
        ]
        names = frozenset(name for _, rule in rules for name in bound_names(rule))
        return cls(module, names, frozenset(adapter for adapter, _ in rules))

    def changed_in(self, mode: Mode) -> bool:
        """Whether an active adapter rewrites the model's inputs."""
        return not self.adapters.isdisjoint(mode.names)

    def has_cut(self, capture: Capture, cut: Cut) -> bool:
        """Whether a cut is made in a capture: in ordinary ones, inputs are not rewritten."""
        return not changes_inputs(cut) or id(capture) in self._made

    def planned(self, capture: Capture, find: Find) -> Capture:
        """Capture that rules are applied to; itself, unless an adapter rewrites the inputs."""
        return self._versions_of(capture, find)[0].capture if self.adapters else capture

    def fitting(
        self,
        capture: Capture,
        call: Call,
        training: bool,
        find: Find,
        serve: Callable[[Capture], Capture],
        changed: Callable[[Capture], Shapes],
    ) -> Capture:
        """Find or make the version of ``capture`` that serves a call with rewritten inputs.

        ``serve`` makes a version runnable, ``changed`` gives the shapes that its inputs have then.
        PSG352 if the inputs do not fit once they are changed, PSG354 for a call that goes on from a
        text, whose inputs were changed before.
        """
        if call.past is not None and call.past.seen:
            message = "the cache of this call has in it already what the rules put before a text"
            hint = "use generate(), or give the whole text without a cache"
            raise SurgeryError("PSG354", message, hint)
        first, *others = self._versions_of(capture, find)
        for version in (first, *others):
            ready = serve(version.capture)
            if ready.fits(call.leaves, training):
                return ready
        shapes = first.sizes(changed(first.capture), call.leaves)
        try:
            ready = serve(self._add(capture, find, shapes).capture)
        except SurgeryError as error:
            raise _misfit(ready, call) from error
        if not ready.fits(call.leaves, training):
            raise _misfit(ready, call)
        return ready

    def _versions_of(self, capture: Capture, find: Find) -> list[ChangeableInputs]:
        """Versions of a capture with rewritable inputs, at least one. Raises PSG351 for none."""

        def made() -> list[ChangeableInputs]:
            self._add(capture, find, {})
            return self._versions[id(capture)]

        return known_or_made(lambda: self._versions.get(id(capture)), made)

    def _add(self, capture: Capture, find: Find, shapes: Shapes) -> ChangeableInputs:
        """A further version, for inputs that have these shapes once they are changed."""
        with making():
            made = self._make(capture, find, shapes)
            self._made[id(made.capture)] = made
            self._versions[id(capture)] = [*self._versions.get(id(capture), ()), made]
        return made

    def conditioned(self, capture: Capture, ready: Capture, cuts: Sequence[Cut]) -> Capture:
        """Restate the size conditions of ``ready`` for inputs before they are rewritten."""
        made = self._made.get(id(capture))
        if made is None:
            return ready
        return replace(ready, conditions=made.conditions(new_shapes(cuts)))

    def _make(self, capture: Capture, find: Find, shapes: Shapes) -> ChangeableInputs:
        """Make a capture of embeddings, with the embedding of tokens put before it."""
        values = self._embeddings(capture)
        replaced = [ids for ids, embeds in TOKENS.items() if embeds in values]
        behind = capture
        if values or shapes:
            behind = find(_resized(call_behind(capture, values, replaced), shapes))
        return computed_from(capture, behind, values) if values else as_given(behind)

    def _embeddings(self, capture: Capture) -> dict[str, fx.Node]:
        """Embedding nodes, by the argument that takes embeddings instead of tokens."""
        values = {}
        for ids, embeds in TOKENS.items():
            if ids not in capture.names or not self.names & _names_of(embeds):
                continue
            node = embedded(capture, ids)
            if node is None or not takes(self.module, embeds):
                reason = "has no one table of them" if node is None else f"takes no '{embeds}'"
                name = type(self.module).__name__
                raise SurgeryError(
                    "PSG351",
                    f"the tokens of {name} cannot be changed once they are embedded: it {reason}",
                    "choose a method that changes what is inside, such as prefix_tuning",
                )
            values[embeds] = node
        return values


def _names_of(argument: str) -> set[str]:
    return {name for name, known in ARGUMENTS.items() if known == argument}


def _resized(call: Call, shapes: Shapes) -> Call:
    tensors = {
        name: torch.empty(tuple(shapes[name]), dtype=value.dtype, device="meta")
        if name in shapes and isinstance(value, torch.Tensor)
        else value
        for name, value in call.tensors.items()
    }
    return replace(call, tensors=tensors)


def _misfit(capture: Capture, call: Call) -> SurgeryError:
    """The refusal of a call whose inputs do not fit once some of them are longer. PSG352."""
    unmet = capture.unmet(call.leaves)
    needed = f": {unmet[0]} is needed" if unmet else ""
    message = f"these inputs do not fit together once the rules have changed them{needed}"
    hint = "see that the rules rewrite every input that has a value for each token"
    return SurgeryError("PSG352", message, hint)
