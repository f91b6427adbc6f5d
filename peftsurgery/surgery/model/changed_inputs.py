"""Models whose inputs are rewritten: rules apply to a front before the captured model.

A *front* (:mod:`peftsurgery.capture.fronts`) is the capture of embeddings with the embedding's own
nodes before it. While an adapter that changes the inputs is active, every call is served by one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from peftsurgery.anatomy.arguments import ARGUMENTS, TOKENS
from peftsurgery.anatomy.inputs import embedded
from peftsurgery.capture import Capture
from peftsurgery.capture.fronts import Front, as_it_is, call_behind, put_before
from peftsurgery.capture.generating import check_generates
from peftsurgery.capture.program import generate_forward
from peftsurgery.capture.signature import Call, takes
from peftsurgery.capture.threads import making
from peftsurgery.errors import SurgeryError
from peftsurgery.surgery.model.choices import Choice, Rows
from peftsurgery.surgery.model.switching import Switchable
from peftsurgery.surgery.plan.cut import Cut, Operation
from peftsurgery.surgery.plan.mode import Mode
from peftsurgery.surgery.rewrite.inputs import bound_names, entries, new_shapes

Find = Callable[[Call], Capture]
PROMPTS = ("inputs", *TOKENS, *TOKENS.values())


@dataclass(eq=False)
class Fronts:
    """Fronts of each capture: the graphs in which operations on the inputs are made.

    ``names`` are the inputs that the rules of the ``adapters`` rewrite or read. ``find`` gives the
    capture that serves a call of the model behind.
    """

    module: Any
    names: frozenset[str]
    adapters: frozenset[str]
    made: dict[int, list[Front]] = field(default_factory=dict)
    by_capture: dict[int, Front] = field(default_factory=dict)

    @classmethod
    def of(cls, operations: Iterable[Operation], module: Any) -> Fronts | None:
        """None if no operation is on the inputs. ``module`` is the model itself."""
        rules = [
            (operation.name, rule)
            for operation in operations
            for rule in operation.file.rules
            if rule.kind.resizes and rule.applies(operation.settings)
        ]
        names = frozenset(name for _, rule in rules for name in bound_names(rule))
        adapters = frozenset(adapter for adapter, _ in rules)
        return cls(module, names, adapters) if rules else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Fronts:
        return self  # what it holds is immutable, and the same for a copy of the model

    def all(self, capture: Capture, find: Find) -> list[Front]:
        """The fronts there are for the calls that a capture serves; at least one.

        A front's own capture has that front. PSG351 if the model has none.
        """
        if id(capture) not in self.made:
            with making():
                if id(capture) in self.by_capture:
                    return [self.by_capture[id(capture)]]
                if id(capture) not in self.made:  # another thread may have made it meanwhile
                    self.add(capture, find, {})
        return self.made[id(capture)]

    def add(self, capture: Capture, find: Find, shapes: Mapping[str, Sequence[int]]) -> Front:
        """A further front, over a capture that serves inputs of these shapes."""
        with making():
            front = self.make(capture, find, shapes)
            self.by_capture[id(front.capture)] = front
            self.made[id(capture)] = [*self.made.get(id(capture), ()), front]
        return front

    def make(self, capture: Capture, find: Find, shapes: Mapping[str, Sequence[int]]) -> Front:
        """The capture of embeddings that fits, with the embedding before it."""
        values = self.embeddings(capture)
        replaced = [ids for ids, embeds in TOKENS.items() if embeds in values]
        behind = capture
        if values or shapes:
            behind = find(_resized(call_behind(capture, values, replaced), shapes))
        return put_before(behind, capture, values) if values else as_it_is(behind)

    def embeddings(self, capture: Capture) -> dict[str, fx.Node]:
        """Where tokens are embedded, by the argument that takes embeddings instead of tokens."""
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


def _resized(call: Call, shapes: Mapping[str, Sequence[int]]) -> Call:
    tensors = {
        name: torch.empty(tuple(shapes[name]), dtype=value.dtype, device="meta")
        if name in shapes and isinstance(value, torch.Tensor)
        else value
        for name, value in call.tensors.items()
    }
    return replace(call, tensors=tensors)


class Fronted(Switchable):
    """A model with adapters of which some may change its inputs."""

    _fronts: Fronts | None

    @abstractmethod
    def _cuts_in(self, capture: Capture, mode: Mode) -> list[Cut]:
        """The cuts that are made in a capture in a mode."""

    def find(self, call: Call, mode: Mode | None = None) -> Capture:
        """The capture that serves a call. PSG352 if its inputs do not fit once they are changed."""
        mode = self.mode if mode is None else mode
        capture = self.captured(call)
        fronts = self._fronts_of(capture, mode)
        if self._fronts is None or not fronts:
            return self.serve(capture, mode)
        if call.past is not None and call.past.seen:
            raise SurgeryError(
                "PSG354",
                "the cache of this call has in it already what the rules put before a text",
                "use generate(), or give the whole text without a cache",
            )
        for front in fronts:
            ready = self.serve(front.capture, mode)
            if ready.fits(call.leaves, self.training):
                return ready
        sizes = fronts[0].sizes(new_shapes(self._cuts_in(fronts[0].capture, mode)), call.leaves)
        try:
            longer = self.serve(self._fronts.add(capture, self.captured, sizes).capture, mode)
        except SurgeryError as error:
            raise _misfit(ready, call) from error
        if not longer.fits(call.leaves, self.training):
            raise _misfit(longer, call)
        return longer

    def serve(self, capture: Capture, mode: Mode | None = None) -> Capture:
        """Make a capture runnable; rules about the inputs are applied to its front."""
        mode = self.mode if mode is None else mode
        fronts = self._fronts_of(capture, mode)
        own = fronts[0].capture if fronts else capture
        return self._serving.ready(mode, own, partial(self._equipped, own, mode))

    def _fronts_of(self, capture: Capture, mode: Mode) -> list[Front]:
        """The fronts of a capture; none if no active adapter changes the inputs."""
        if self._fronts is None or not self._changes_inputs(mode):
            return []
        return self._fronts.all(capture, self.captured)

    def _changes_inputs(self, mode: Mode) -> bool:
        """Whether an active adapter changes what the model is given."""
        adapters = frozenset[str]() if self._fronts is None else self._fronts.adapters
        return not mode.entered and not adapters.isdisjoint(mode.names)

    def _entered(self, capture: Capture) -> Capture:
        """What rules are applied to: a capture, or its front if some change the inputs."""
        fronts = [] if self._fronts is None else self._fronts.all(capture, self.captured)
        return fronts[0].capture if fronts else capture

    def _resized(
        self, capture: Capture, ready: Capture, cuts: Sequence[Cut], mode: Mode
    ) -> Capture:
        """``ready``, with conditions for the sizes that inputs have before the cuts."""
        fronts = self._fronts_of(capture, mode)
        if not fronts:
            return ready
        return replace(ready, conditions=fronts[0].conditions(new_shapes(cuts)))

    def enter(self, mode: Mode | None = None, **given: Any) -> dict[str, Tensor]:
        """Rewrite inputs by the active adapters; returns them by argument name.

        ``given`` are arguments of the model by name: tokens or embeddings, a mask, positions.
        """
        self.bind()
        call = self.call_of(**given, use_cache=False)
        ready = self.find(call, mode)
        names, graph = entries(ready.top.graph)
        values = generate_forward(graph, "inputs")(self, *call.leaves)
        return dict(zip(names, values, strict=True))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate tokens with the original's ``generate``; adapters may change the inputs too.

        Their part is done once, and the model goes on from what they made of the inputs.
        ``adapters=[...]`` names one adapter for each prompt, as in a call, which its beams and
        samples have too. PSG353 if an adapter changes the outputs as well.
        """
        check_generates(self.source.module)
        choice = self.chosen(kwargs, repeated=True)
        if choice.rows is not None and choice is not self._choices.now:
            _check_prompts(choice.rows, [*args[:1], *map(kwargs.get, PROMPTS)])
        if not self._changes_inputs(choice.mode):
            return self._written(choice, *args, **kwargs)
        if args:
            kwargs["inputs"], *others = args
            args = (None, *others)
        given = self._given(kwargs, choice.mode)
        with torch.no_grad():
            entered = self.enter(choice.mode, **given)
        lengths = self._counted(kwargs, given)
        choice = replace(choice, mode=replace(choice.mode, entered=True))
        return self._written(choice, *args, **{**kwargs, **lengths, **given, **entered})

    def _written(self, choice: Choice, *args: Any, **kwargs: Any) -> Any:
        """What the original's ``generate`` gives if every call of the model makes this choice."""
        return self.writer(partial(self, adapters=choice)).generate(*args, **kwargs)

    def _given(self, settings: dict[str, Any], mode: Mode) -> dict[str, Tensor]:
        """The inputs among the settings of ``generate``, and the mask that it would make."""
        for cut in self._cuts_in(self._entered(self.base_capture), mode):
            if not cut.rule.rewrite.keys().isdisjoint(cut.rule.kind.outputs):
                raise SurgeryError(
                    "PSG353",
                    f"{cut.operation.name} combines what the model says, which generation asks for "
                    "token by token",
                    "generate with one of its prompts, under prompt_tuning",
                )
        inputs = settings.pop("inputs", None)
        if inputs is not None:
            settings["input_ids"] = inputs
        names = {*TOKENS, *ARGUMENTS.values()} - {"labels"}
        given = {name: settings.pop(name) for name in names if settings.get(name) is not None}
        if "attention_mask" not in given:
            given["attention_mask"] = self._mask(given, settings)
        return given

    def _counted(self, settings: dict[str, Any], given: Mapping[str, Tensor]) -> dict[str, int]:
        """Convert total lengths into numbers of new tokens, without counting what rules add.

        They leave ``settings``.
        """
        if "input_ids" not in given:
            return {}
        config = settings.get("generation_config") or self.generation_config
        counted, text = {}, given["input_ids"].shape[1]
        for name, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            length = settings.pop(name, None) or getattr(config, name, None)
            if length and not (settings.get(new) or getattr(config, new, None)):
                counted[new] = max(length - text, 0)
        return counted

    def _mask(self, given: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
        """The mask of inputs without one: padding is told from text if it is no end of a text."""
        tokens = given.get("input_ids")
        if tokens is None:
            return torch.ones_like(given["inputs_embeds"][..., 0], dtype=torch.long)
        config = settings.get("generation_config") or self.generation_config
        pad = settings.get("pad_token_id", config.pad_token_id)
        ends = settings.get("eos_token_id", config.eos_token_id)
        if pad is None or pad in (ends if isinstance(ends, list | tuple) else [ends]):
            return torch.ones_like(tokens)
        mask = (tokens != pad).long()
        return mask if bool(mask.any()) else torch.ones_like(tokens)


def _check_prompts(rows: Rows, given: Iterable[Any]) -> None:
    """Refuse adapters that are named for more or fewer prompts than there are. PSG314."""
    prompts = next((value for value in given if value is not None), None)
    if prompts is not None:
        replace(rows, repeated=False).times(len(prompts))


def _misfit(capture: Capture, call: Call) -> SurgeryError:
    """The refusal of a call whose inputs do not fit once some of them are longer."""
    unmet = capture.unmet(call.leaves)
    needed = f": {unmet[0]} is needed" if unmet else ""
    return SurgeryError(
        "PSG352",
        f"these inputs do not fit together once the rules have changed them{needed}",
        "see that the rules rewrite every input that has a value for each token",
    )
