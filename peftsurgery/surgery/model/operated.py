"""Operated models: a captured model and an ordered list of operations on it.

The programs of an operated model are the captured ones rewritten; they are made again for every new
capture, so whatever inputs the original takes, the operated model takes. Removing operations gives
back the captured programs themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftsurgery.capture import Capture, GraphModel, ModuleInfo
from peftsurgery.capture.names import join
from peftsurgery.capture.threads import making
from peftsurgery.errors import SurgeryError
from peftsurgery.language import Located, Selection, initial_values, shape_of, weights_read
from peftsurgery.surgery.fourbit.store import Store
from peftsurgery.surgery.model.changed_inputs import Fronted, Fronts
from peftsurgery.surgery.model.choices import Choices
from peftsurgery.surgery.model.holders import Adapter, register
from peftsurgery.surgery.model.packed_weights import Keeping
from peftsurgery.surgery.model.penalty import penalty_of
from peftsurgery.surgery.model.report import Report
from peftsurgery.surgery.model.state_dict import keep_learnt
from peftsurgery.surgery.model.surgery_files import save_surgery
from peftsurgery.surgery.model.switching import left_out_of
from peftsurgery.surgery.model.trained_copies import Copies
from peftsurgery.surgery.plan.cut import Cut, Operation, check_free, check_lengthened
from peftsurgery.surgery.plan.fusion import check_fused, check_fusions, taking_part
from peftsurgery.surgery.plan.mode import Mode, mode_of
from peftsurgery.surgery.plan.same_places import Chosen, check_reached
from peftsurgery.surgery.plan.select import select_cuts
from peftsurgery.surgery.rewrite.capture import Rewrites
from peftsurgery.surgery.rewrite.inputs import check_inputs, is_at_boundary
from peftsurgery.surgery.rewrite.layout import orient
from peftsurgery.surgery.rewrite.shapes import check_shapes


class OperatedModel(Fronted, Keeping):
    """Captured model with operations; only what its rules made is trained."""

    def __init__(
        self,
        model: GraphModel,
        operations: Sequence[Operation],
        known: Mapping[str, torch.Tensor] | None = None,
        active: Collection[str] | None = None,
    ) -> None:
        """The operations on ``model``, or on the base of an operated one.

        ``known`` are values for parameters by name, instead of their initial ones. ``active`` are
        the adapters that take part in a call: all of them unless given.
        """
        self._operations = tuple(operations)
        check_fusions(self._operations)
        self._known = dict(known or {})
        self._selections: tuple[Selection, ...] = ()
        self._selected: dict[int, Chosen] = {}
        self._cuts: tuple[Cut, ...] = ()
        self._copies = Copies()
        self._store = Store()
        self._resting: set[str] = set()
        self._worked = frozenset(operation.name for operation in self._operations)
        self._rewrites = Rewrites()
        self._fronts = Fronts.of(self._operations, model.source.module)
        super().__init__(model._captures, _frozen)
        self._base = _Base(model.base if isinstance(model, OperatedModel) else model)
        self._adopt(model)
        self._choices = Choices()
        self.lost: dict[str, float] = {}  # by adapter, of what it was combined of
        with making():
            self.settle(self._select(self._entered(self.base_capture)))
        mode = mode_of(
            self.adapters, self.adapters if active is None else active, left_out_of(model)
        )
        self._copies.place(self)
        self._switch(mode)
        keep_learnt(self)

    @property
    def base(self) -> GraphModel:
        """The captured model that the operations are on."""
        return self._base.model

    @property
    def operations(self) -> tuple[Operation, ...]:
        """The operations, in the order they were applied."""
        return self._operations

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """Every cut in the capture the rules were applied to."""
        return self._cuts

    @property
    def report(self) -> Report:
        """What every rule matched, what it added, and what it nearly matched and why not."""
        return Report(self)

    def _adopt(self, model: GraphModel) -> None:
        """Share the current tensors of ``model``, as cast and moved, and its train modes.

        What ``model`` itself trained of the base is not the base's: those values come with the
        operations. Buffers are copied, since training changes them in place.
        """
        copies = model._copies if isinstance(model, OperatedModel) else Copies()
        parameters: dict[int, nn.Parameter] = {}
        buffers: dict[int, torch.Tensor] = {}
        for name in self._captures.tensors:
            owner, _, leaf = name.rpartition(".")
            mine = self.get_submodule(owner)
            place, _, there = copies.base_name(name).rpartition(".")
            tensor = getattr(model.get_submodule(place), there)
            if leaf in mine._parameters:
                mine._parameters[leaf] = parameters.setdefault(id(tensor), _frozen(tensor))
            else:
                mine._buffers[leaf] = buffers.setdefault(id(tensor), tensor.detach().clone())
        for path, part in self.named_modules():
            part.training = model.get_submodule(path).training
        if isinstance(model, OperatedModel):
            self._store.adopt(model._store)
        self._bound = model._bound

    def transform(self, capture: Capture, *choice: Mode) -> Capture:
        """Replay on a capture the operations that take part in the mode given, or in this thread's.

        PSG307 if it has sites the first one had not, PSG318 if it has lost some.
        """
        mode = next(iter(choice), self.mode)
        chosen = self._select(capture)
        check_reached(Chosen(self._cuts, self._selections), chosen, mode.takes_part)
        cuts = taking_part(chosen.cuts, mode)
        order = mode.names if mode.by_row else None
        moved = self._copies.moved(mode.replacing, mode.by_row)
        ready = self._rewrites.capture(capture, cuts, order, self._store.weights, moved)
        return self._resized(capture, ready, cuts, mode)

    def _cuts_in(self, capture: Capture, mode: Mode) -> list[Cut]:
        return taking_part(self._select(capture).cuts, mode)

    @property
    def captures(self) -> tuple[Capture, ...]:
        """The captures served so far in the mode of this thread, the first one first."""
        return self._serving.captures(self.mode)

    def _select(self, capture: Capture) -> Chosen:
        """Where all operations cut in a capture, active or not, and the selections."""
        if id(capture) in self._selected:
            return self._selected[id(capture)]
        with making():
            cuts: list[Cut] = []
            selections: list[Selection] = []
            for operation in self._operations:
                found, chosen = select_cuts(capture, operation, cuts)
                cuts += found
                selections += chosen
            self._selected[id(capture)] = Chosen(tuple(cuts), tuple(selections))
        return self._selected[id(capture)]

    def settle(self, chosen: Chosen) -> None:
        """Check the selections, add the parameters and free what the rules train."""
        cuts, selections = chosen.cuts, chosen.selections
        check_fused(self._operations, cuts)
        for selection in selections:
            selection.check()
        check_free(cuts, (name for name, _ in self.named_parameters()))
        check_lengthened(cuts, selections[0].sites if selections else ())
        for cut in _one_for_each_place(cuts):
            check_inputs(cut) if is_at_boundary(cut) else check_shapes(cut)
        self._cuts, self._selections = tuple(cuts), tuple(selections)
        self._store.settle(self, cuts)
        self._store.pack(self)
        for cut in cuts:
            self.add_parameters(cut)
            if cut.rule.train and cut.placed.parameter is not None:
                self.own(cut.placed.parameter, cut.operation.name)
        self._known.clear()

    def add_parameters(self, cut: Cut) -> None:
        """Register the parameters of a cut, with their initial values."""
        if not cut.rule.params:
            return
        holder = self.holder(join(cut.placed.block, cut.place))
        if not cut.rule.params.keys() <= holder._parameters.keys():
            for name, value in self.starts(cut).items():
                param = cut.rule.params[name]
                made = nn.Parameter(value, requires_grad=param.train)
                if param.shared:
                    made = self._share(cut.parameters[name], made)
                register(holder, name, made)

    def _share(self, name: str, made: nn.Parameter) -> nn.Parameter:
        """The parameter that all sites of an operation have: the one made for the first of them."""
        owner, _, leaf = name.rpartition(".")
        holder = self.holder(owner)
        if leaf not in holder._parameters:
            register(holder, leaf, made)
        return holder.get_parameter(leaf)

    def starts(self, cut: Cut) -> dict[str, torch.Tensor]:
        """Starting values of a cut's parameters: known values, or evaluated initial ones."""
        known = {name: self.known(cut, name) for name in cut.parameters if self.knows(cut, name)}
        unknown = [param for name, param in cut.rule.params.items() if name not in known]
        env: dict[str, Any] = {**dict.fromkeys(cut.rule.kind.weights, 0.0), **cut.numbers}
        read = {n for param in unknown for n in weights_read(param, cut.rule, cut.numbers)}
        env |= {name: self.weight(cut, name) for name in sorted(read)}
        return initial_values(cut.rule, env, known, device=self.device_of(cut))

    def knows(self, cut: Cut, name: str) -> bool:
        """Whether there is a value for a cut's parameter."""
        return cut.parameters[name] in self._known or self._is_shared(cut, name)

    def _is_shared(self, cut: Cut, name: str) -> bool:
        """Whether an earlier cut made a parameter that all of them share."""
        holder: nn.Module | None = self if cut.rule.params[name].shared else None
        for part in cut.parameters[name].split(".")[:-1]:
            holder = None if holder is None else holder._modules.get(part)
        return holder is not None and name in holder._parameters

    def known(self, cut: Cut, name: str) -> torch.Tensor:
        """The value there is for a cut's parameter. PSG308 if it has another shape."""
        param, full = cut.rule.params[name], cut.parameters[name]
        shape = shape_of(param, cut.rule, cut.numbers)
        value = self.get_parameter(full) if self._is_shared(cut, name) else self._known[full]
        if tuple(value.shape) != shape:
            raise SurgeryError(
                "PSG308", f"'{full}' has shape {list(value.shape)}, where {list(shape)} is needed"
            )
        return value.detach().to(device=self.device_of(cut), dtype=getattr(torch, param.dtype))

    def holder(self, path: str) -> nn.Module:
        """The module at a path, made of new parts where there is none. PSG304 if it is taken."""
        module: nn.Module = self
        for name in path.split("."):
            if name not in module._modules:
                if hasattr(module, name):
                    hint = "apply under another name: apply(..., name='second')"
                    raise SurgeryError("PSG304", f"'{path}' is not free: '{name}' is taken", hint)
                part = Adapter(ModuleInfo("Adapter"))
                part.training = self.training
                module.add_module(name, part)
            module = module.get_submodule(name)
        return module

    def weight(self, cut: Cut, name: str) -> Any:
        """A weight of a cut's site as the rule sees it, for an initial value; 0.0 without one."""
        node = cut.site.nodes.get(name)
        if node is None:
            return 0.0
        self.bind()
        return orient(self.dense(join(cut.placed.block, str(node.target))), cut.site, name)

    def device_of(self, cut: Cut) -> torch.device:
        """Where a cut's parameters belong: with the weight of its site, if that is anywhere yet."""
        name = cut.placed.parameter
        stored = None if name is None else self.get_parameter(name)
        if stored is None:
            stored = next(iter(self.parameters()), None)
        return torch.device("cpu") if stored is None or stored.is_meta else stored.device

    def own(self, name: str, adapter: str) -> None:
        """Give an adapter its own, trainable copy of a parameter of the base.

        A value that is known for the parameter itself is the adapter's too. PSG308 if it has
        another shape.
        """
        home = self._copies.add(name, adapter)
        mine = self.get_parameter(name)
        value = self._known.get(home, self._known.get(name, mine)).detach()
        if value.shape != mine.shape:
            raise SurgeryError(
                "PSG308", f"'{name}' has shape {list(value.shape)}, not {list(mine.shape)}"
            )
        owner, _, leaf = home.rpartition(".")
        # a value that is known waits for the base's weights where it is, others are read with them
        device = value.device if mine.is_meta else mine.device
        copied = value.to(device=device, dtype=mine.dtype, copy=True)
        register(self.holder(owner), leaf, nn.Parameter(copied))

    def _read_weights(self) -> None:
        """Read the base's weights; those that the rules train are copied."""
        with self._copies.put_back(self):
            super()._read_weights()
            for home, (name, _) in self._copies.made.items():
                copied = self.get_parameter(home)
                if copied.is_meta:
                    value = self.get_parameter(name).detach().clone()
                    trained = nn.Parameter(value, requires_grad=copied.requires_grad)
                    torch.utils.swap_tensors(copied, trained)
        if self._store.weights:
            self._store.pack(self)
            self.source.release()

    def fill(self) -> None:
        """Read the base's weights if rules train some of them, and there are any to read."""
        copies = (self._learnt_parameter(home) for home in self._copies.made)
        if self.source.is_readable and any(copy.is_meta for copy in copies):
            self.bind()

    def finished(self, outputs: Any, mode: Mode) -> Any:
        """What the original returns; while training, a loss by name has the penalty added to it.

        A loss in a tuple is the original's: add :meth:`penalty` to it.
        """
        if self.training and isinstance(outputs, dict):
            loss = outputs.get("loss")
            cuts = taking_part(self._cuts, mode)
            if isinstance(loss, torch.Tensor) and any(cut.rule.penalty for cut in cuts):
                added = penalty_of(self, cuts, mode.replacing)
                outputs["loss"] = loss + added.to(loss.device)
        return outputs

    def penalty(self) -> torch.Tensor:
        """Sum of the active rules' penalties, a scalar that is added to the loss; 0 for none."""
        return penalty_of(self, self.active_cuts, self.mode.replacing)

    def unread(self, name: str) -> list[str]:
        """Aliases of a tied parameter that no program reads; they follow its replacements."""
        read = {site.parameter for site in self.sites if site.kind == "parameter"}
        return [alias for alias in self._captures.names[name] if alias not in read]

    @property
    def sites(self) -> Sequence[Located]:
        """All sites of the capture that the rules were applied to; none without a rule."""
        return self._selections[0].sites if self._selections else ()

    @property
    def active_cuts(self) -> tuple[Cut, ...]:
        """The cuts of the adapters that take part in a call."""
        return tuple(taking_part(self._cuts, self.mode))

    @property
    def base_names(self) -> frozenset[str]:
        """Current names of the base's own tensors."""
        return frozenset(map(self.base_name, self._captures.tensors))

    @property
    def trained(self) -> frozenset[str]:
        """The base's parameters that the active adapters train, each its own copy."""
        return self._copies.trained(self.mode.replacing)

    def learnt(self, *adapters: str) -> dict[str, torch.Tensor]:
        """Parameters that adapters (all unless named) added or trained, by name.

        That is all that a saved surgery holds.
        """
        return {self.name_of(name): value for name, value in self.values(*adapters).items()}

    def values(self, *adapters: str) -> dict[str, torch.Tensor]:
        """Parameters of :meth:`learnt`, under names independent of which adapters are active."""
        self.fill()
        return {
            name: self._learnt_parameter(name)
            for name, owner in self._owners.items()
            if not adapters or owner in adapters
        }

    @cached_property
    def _owners(self) -> Mapping[str, str]:
        added = {n: cut.operation.name for cut in self._cuts for n in cut.parameters.values()}
        return {**added, **{home: adapter for home, (_, adapter) in self._copies.made.items()}}

    def save(self, path: str | Path, names: Collection[str] | None = None) -> None:
        """Write the rules, a manifest and what was learnt to the directory ``path``.

        All adapters are saved, active or not, unless ``names`` chooses among them (PSG310). No
        base weights and no pickle. A surgery that is there is replaced, file by file; PSG604 if
        something else is, PSG207 if what is trained of the base was never anywhere.
        """
        self.check_in_place()
        if any(value.is_meta for value in self.values().values()):
            self.bind()
        save_surgery(self, Path(path), names)


@dataclass(frozen=True)
class _Base:
    """Holds the base without making it a part of the model."""

    model: GraphModel

    def __deepcopy__(self, memo: dict[int, Any]) -> _Base:
        return self  # a copy of an operated model is on the same base


def _one_for_each_place(cuts: Iterable[Cut]) -> list[Cut]:
    """One cut for each site of a program: blocks of one shape class need checking once."""
    return list({(cut.operation, id(cut.rule), cut.site): cut for cut in cuts}.values())


def _frozen(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter of one's own over the same memory, not trained."""
    return nn.Parameter(parameter.detach(), requires_grad=False)
