"""Operated models: a captured model and an ordered list of operations on it.

The programs of an operated model are the captured ones rewritten, for every choice of adapters that
a call makes; they are made again for every new capture, so whatever inputs the original takes, the
operated model takes. Removing operations gives back the captured programs themselves.

How a call is served, top-down:

    forward          what the call chooses: adapters for all rows, or one for each
    _find            the capture that serves its inputs, as the original runs it
    _served          that capture in the mode chosen: made once, then looked up
    _transformed     its plan, its cuts in that mode, and the rewritten programs
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftsurgery.capture import Capture, GraphModel
from peftsurgery.capture.generating import check_generates
from peftsurgery.capture.program import generate_forward
from peftsurgery.capture.sharded import by_the_first, check_whole, first_sharded, whole
from peftsurgery.capture.signature import Call
from peftsurgery.capture.tensors import persistent_buffers
from peftsurgery.capture.threads import making
from peftsurgery.checkpoint.model_plan import ModelPlan
from peftsurgery.errors import SurgeryError
from peftsurgery.offered import offered
from peftsurgery.surgery.model.changed_inputs import ChangedInputs
from peftsurgery.surgery.model.choices import Choice
from peftsurgery.surgery.model.choosing import ChoosingModel
from peftsurgery.surgery.model.fold_sites import model_plan
from peftsurgery.surgery.model.generation import check_outputs, check_prompts, split_inputs
from peftsurgery.surgery.model.holders import add_parameter
from peftsurgery.surgery.model.learnt import Learnt
from peftsurgery.surgery.model.moved_buffers import moved_buffers
from peftsurgery.surgery.model.new_parameters import new_parameters, read_weights
from peftsurgery.surgery.model.penalty import penalty_of
from peftsurgery.surgery.model.report import Report, capture_notes, counted
from peftsurgery.surgery.model.rewriting import Rewriting
from peftsurgery.surgery.model.saved.writing import Saved, is_updated, parts_of, write_surgery
from peftsurgery.surgery.model.shared import operations_of
from peftsurgery.surgery.model.state_dict import keep_learnt
from peftsurgery.surgery.model.writable import check_places
from peftsurgery.surgery.plan.cut import Cut, Operation, notes_of
from peftsurgery.surgery.plan.fusion import taking_part
from peftsurgery.surgery.plan.mode import Mode
from peftsurgery.surgery.plan.plan import Plan
from peftsurgery.surgery.rewrite.inputs import new_inputs


class OperatedModel(ChoosingModel):
    """Captured model with operations; only what its rules made is trained."""

    def __init__(
        self, model: GraphModel, plan: Plan, inputs: ChangedInputs, learnt: Learnt
    ) -> None:
        """Carry out a plan, which was made and checked, on ``model`` or on its base.

        ``inputs`` are what the plan's operations change of the inputs.
        """
        super().__init__(model, Rewriting(plan, inputs, learnt.exact))
        self._lost = dict(learnt.lost)
        with making():
            if read_weights(plan.cuts, learnt.values):
                self._bind_base()
            dense = partial(self._read, ())
            made = new_parameters(plan.cuts, learnt.values, dense, self.get_parameter, self.device)
        for name, parameter in made.items():
            add_parameter(self, name, parameter)
        self._copies.give_names(self)
        self._choose(self._adapters.mode_with(Mode(), learnt.active, learnt.left_out))
        self._adapters.train(self, learnt.trains)
        kind = OperatedModel  # asked by name: copies of the model are asked for what is theirs
        keep_learnt(
            self,
            kind._fill,
            kind._names_of_base,
            lambda mine, state, prefix: mine._copies.rename(state, prefix, ()),
        )

    # What there is: operations, adapters, what they learnt.

    @property
    def operations(self) -> tuple[Operation, ...]:
        """The operations, in the order they were applied."""
        return self._plan.operations

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """Every cut in the capture the rules were applied to."""
        return self._plan.cuts

    @property
    def report(self) -> Report:
        """What every rule matched, what it added, and what it nearly matched and why not."""
        mode, packed = self._adapters.mode, dict(self.named_parameters(remove_duplicate=False))
        # of the graph before any rewrite: what rules put in is not the model's to be read
        notes = (*self.source.build.notes, *capture_notes(self.base_capture))
        trained, total = counted(self.parameters(), self._adapters.resting(self, mode))
        return Report(
            self._plan,
            {name: name in mode.names for name in self.adapters},
            {name: list(self.get_parameter(name).shape) for name in self._plan.added},
            trained,
            total + self._packed.hidden(packed),
            (*notes, *notes_of(self.operations)),
            dict(self._lost),
        )

    @property
    def trained(self) -> frozenset[str]:
        """The base's parameters that the active adapters train, each its own copy."""
        return self._copies.trained(self._adapters.mode.replacing)

    def dense(self, name: str) -> Tensor:
        """What a call reads for a parameter of the base: an active adapter's copy, or its own.

        Shape and dtype are those of the base; a packed weight is unpacked.
        """
        return self._read(self._adapters.mode.replacing, name).detach()

    def learnt(self, *adapters: str) -> dict[str, Tensor]:
        """Parameters that adapters (all unless named) added or trained, by name.

        That is all that a saved surgery holds.
        """
        copies = self._copies
        return {copies.name(name): value for name, value in self._values(*adapters).items()}

    def _values(self, *adapters: str) -> dict[str, Tensor]:
        """Parameters of :meth:`learnt`, under names independent of which adapters are active."""
        self._fill()
        return {
            name: self._adapters.parameter(self, name)
            for name, owner in self._adapters.owners.items()
            if not adapters or owner in adapters
        }

    def all_learnt(self) -> Learnt:
        """State to carry over into a model that is made of this one. PSG225 if it is sharded."""
        check_whole(self)
        mode, trains = self._adapters.mode, self._adapters.trains(self)
        left_out, exact = dict(mode.left_out), self._rewriting.exact
        return Learnt(self._values(), mode.names, left_out, trains, self._lost, exact)

    def penalty(self) -> Tensor:
        """Sum of the active rules' penalties, a scalar that is added to the loss; 0 for none."""
        added = self._penalty(self._adapters.mode)
        return torch.zeros((), device=self.device) if added is None else added

    def save(self, path: str | Path, names: Collection[str] | None = None) -> None:
        """Write the rules, a manifest and what was learnt to the directory ``path``.

        All adapters are saved, active or not, unless ``names`` chooses among them (PSG310). No
        base weights and no pickle. A surgery that is there is replaced, file by file; PSG604 if
        something else is, PSG207 if what is trained of the base was never anywhere. Of a sharded
        model (FSDP2, tensor parallelism) all processes call it, and the first one writes.
        """
        self.check_in_place()
        folder, saved = Path(path), self._adapters.to_save(names)
        updated = folder if is_updated(folder, self.operations, saved) else None
        check_places(self, *parts_of(folder), updated=updated)
        if any(value.is_meta for value in self._values().values()):
            self.bind()
        mode, trained = self._adapters.mode, self._copies.owners()
        buffers = {name: whole(buffer) for name, buffer in persistent_buffers(self).items()}
        moved = moved_buffers(buffers, self._buffer_of_base)
        learnt = {name: whole(value) for name, value in self.learnt(*saved).items()}
        plan = self._fold_plan() if {*saved} == {*self.active} and not moved else None
        own = mode.names, dict(mode.left_out), self._lost, trained, learnt, moved, plan
        write = partial(write_surgery, folder, saved, Saved(self.source, self.operations, *own))
        write() if first_sharded(self) is None else by_the_first(write)

    def diff(self, weights: bool = False, shape: tuple[int, int] | None = None) -> Any:
        """What is different from the base with the adapters that are active now, as a ``Diff``.

        That is ``peftsurgery.diff(o.base, o, weights, shape)``, and raises what that raises.
        """
        return offered("diff")(self.base, self, weights, shape)

    def _fold_plan(self) -> ModelPlan | None:
        """What a fold of the active adapters does to the base's files; None if that cannot be."""
        if self.stored or self.source.build:
            return None
        learnt = self.learnt(*self.active)
        try:
            asked = self.foldable(), self.trained, self.active, learnt
            return model_plan(self.source.module, *asked)
        except SurgeryError:  # it cannot be folded, or not on files; whoever tries is told why
            return None

    def _buffer_of_base(self, name: str) -> Tensor:
        self.base.bind()
        return self.base.get_buffer(name)

    def read_from(self) -> Iterator[str | Path | None]:
        """The places of the base and of what was put on it."""
        yield from super().read_from()
        for operation in self.operations:
            yield operation.origin.folder
            yield from operation.file.sources

    def _repr_html_(self) -> str:
        """What a notebook shows: the blocks, and the report."""
        return super()._repr_html_() + self.report._repr_html_()

    def extra_repr(self) -> str:
        """The adapters, and which of them are active."""
        shown = (n if n in self.active else f"{n} (inactive)" for n in self.adapters)
        return f"adapters: {', '.join(shown)}" if self.adapters else ""

    # How calls are served.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with the active adapters, or with those named for the batch's rows.

        ``adapters=[...]`` names one for each row of the batch, None for the base, for this call
        alone. ``adapter_names=[...]`` does the same in peft's words: the base is ``"__base__"``.
        Either is the original's if its forward has an argument of that name. While training, a loss
        by name has the penalty added to it; a loss in a tuple is the original's.
        """
        choice = self._adapters.take_choice(self.source.module, kwargs, repeated=False)
        with self._running(choice.mode):
            return self._outputs(choice, args, kwargs)

    def _outputs(self, choice: Choice, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a call of a choice returns."""
        self.bind()
        call = self.call_of(*args, **kwargs)
        capture = self._find(call, choice.mode, choice.prepared)
        outputs = capture.returned(self.run(capture, choice.leaves(capture, call)))
        if self.training and isinstance(outputs, dict):
            loss, added = outputs.get("loss"), self._penalty(choice.mode)
            if isinstance(loss, Tensor) and added is not None:
                outputs["loss"] = loss + added.to(loss.device)
        return outputs

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate tokens with the original's ``generate``; adapters may change the inputs too.

        Their part is done once, and the model goes on from what they made of the inputs.
        ``adapters=[...]`` names one adapter for each prompt, as in a call, which its beams and
        samples have too. PSG353 if an adapter changes the outputs as well.
        """
        check_generates(self.source.module)
        choice = self._adapters.take_choice(self.source.module, kwargs, repeated=True)
        if choice.rows is not None and choice is not self._adapters.choices.now:
            check_prompts(choice.rows, args, kwargs)
        if self._rewriting.inputs.changed_in(choice.mode):
            check_outputs(taking_part(self.cuts, choice.mode))
            args, kwargs, given = split_inputs(args, kwargs, self.generation_config)
            with torch.no_grad():
                kwargs |= given | self._change_inputs(choice.mode, given)
            choice = replace(choice, prepared=True)
        with self._running(choice.mode):
            return self.writer(partial(self, adapters=choice)).generate(*args, **kwargs)

    def _change_inputs(self, mode: Mode, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rewrite inputs by the active adapters; returns them by argument name."""
        self.bind()
        call = self.call_of(**given, use_cache=False)
        names, graph = new_inputs(self._find(call, mode).top.graph)
        values = generate_forward(graph, "inputs")(self, *call.leaves)
        return dict(zip(names, values, strict=True))

    def _find(self, call: Call, mode: Mode | None = None, prepared: bool = False) -> Capture:
        """Find the capture that serves a call. Raises PSG352 for rewritten inputs that do not fit.

        ``prepared`` says that they are changed already.
        """
        mode = self._adapters.mode if mode is None else mode
        capture = self.original_capture(call)
        inputs = self._rewriting.inputs
        if prepared or not inputs.changed_in(mode):
            return self._served(capture, mode)
        serve = partial(self._served, mode=mode)
        changed = partial(self._rewriting.new_shapes, mode)
        return inputs.fitting(capture, call, self.training, self.original_capture, serve, changed)

    def _transformed(self, capture: Capture, mode: Mode) -> Capture:
        """Rewrite a capture by the cuts that take part in a mode. Raises PSG307, PSG318."""
        merged = self._merged.names(mode)
        moved = {**self._copies.moved(mode.replacing, mode.by_row), **merged}
        stored = {name: w for name, w in self._packed.weights.items() if name not in merged}
        return self._rewriting.rewritten(capture, mode, stored, moved)

    def _penalty(self, mode: Mode) -> Tensor | None:
        cuts = taking_part(self.cuts, mode)
        return penalty_of(cuts, lambda name: whole(self._read(mode.replacing, name)))

    @property
    def captures(self) -> tuple[Capture, ...]:
        """The captures served so far in the mode of this thread, the first one first."""
        return self._serving.captures(self._adapters.mode)


def active_operations(model: GraphModel) -> list[Operation]:
    """The operations of a model's active adapters; none if it is as it was captured."""
    active = model.active if isinstance(model, OperatedModel) else ()
    return [operation for operation in operations_of(model) if operation.name in active]
