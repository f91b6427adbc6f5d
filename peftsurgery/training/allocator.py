"""Ranks by importance: a budget that shrinks while training, shared among all sites.

AdaLoRA (Zhang et al., 2023, arXiv:2303.10512, sections 3.2 and 3.3, algorithm 1). A weight's
sensitivity is |p · ∂L/∂p|. With s its running mean and u the running mean of how far it is from s,
the importance of an element is s · u, and a rank's is the sum over the parameters that have ranks
of the mean over the rank's elements. Of all ranks of all sites the least important are set to zero,
as many as the budget of the step leaves out. They are trained on and may come back, until the
choice is final.

Any rule with a `ranks:` entry can be allocated; no method is known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from peftsurgery.arguments import checked
from peftsurgery.capture.sharded import sharded_like, whole
from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.files import write_whole
from peftsurgery.finite_tensors import FLOATS, as_safetensors, read_tensors
from peftsurgery.language.evaluation import evaluate
from peftsurgery.language.schema import Ranks
from peftsurgery.surgery.model.operated import OperatedModel
from peftsurgery.surgery.model.writable import check_places
from peftsurgery.surgery.plan.cut import Cut

STATE = "ranks.safetensors"
_RUNNING, _KEPT, _STEP = ("sensitivity", "uncertainty"), "kept", "step"


@dataclass(frozen=True)
class Schedule:
    """When ranks are taken away, in optimiser steps counted from 0, and how many are left."""

    target: int
    total: int
    initial: int
    final: int
    interval: int
    beta1: float
    beta2: float

    def budget(self, step: int, ranks: int, sites: int) -> int:
        """How many of ``ranks`` ranks at ``sites`` sites may stay: all, then a cubic fall."""
        goal = self.target * sites
        if step <= self.initial:
            return ranks
        if step >= self.end:
            return goal
        left = 1 - (step - self.initial) / (self.end - self.initial)
        return int((ranks - goal) * left**3 + goal)

    def chooses(self, step: int) -> bool:
        """Whether ranks are chosen anew after a step."""
        if step == self.end:
            return True
        return self.initial < step < self.end and step % self.interval == 0

    @property
    def end(self) -> int:
        """The step at which the choice becomes final."""
        return self.total - self.final


@dataclass(frozen=True)
class _Ranked:
    """The parameters of one cut that have ranks: their names, and the dimension that counts them.

    The one that is set to zero comes first.
    """

    axes: Mapping[str, int]
    zero: str


class RankAllocator:
    """Allocator of a rank budget: zeroes the least important ranks of an adapter while training.

    Call :meth:`step` once for every optimiser step, while the gradients are there:

        loss.backward(); optimizer.step(); allocator.step(step); optimizer.zero_grad()

    ``kept`` says, by the name of the parameter that is zeroed, which ranks the last choice kept.
    Raises PSG321 if no rule of the adapter has ranks, PSG322 for a schedule that leaves no step to
    take them away; ``total`` is how many there are, where the rules leave that open (0).
    """

    @checked
    def __init__(
        self, model: OperatedModel, name: str | None = None, total: int | None = None
    ) -> None:
        cuts = _cuts(model, name)
        self.model = model
        self.schedule = _schedule(cuts, total)
        self.sites = list({site.zero: site for site in map(_site, cuts)}.values())
        self.kept: dict[str, Tensor] = {}
        self.last = -1
        self._running: dict[str, dict[str, Tensor]] = {key: {} for key in _RUNNING}

    def step(self, step: int) -> dict[str, Tensor] | None:
        """Update importances after optimiser step ``step`` (from 0), and prune ranks if it is due.

        Gives the ranks that are kept, one boolean for each, if they were chosen anew.
        """
        self.last, chosen = step, None
        if step < self.schedule.end:
            self._observe()
        if self.schedule.chooses(step):
            chosen = self.kept = self._choose(step)
        if chosen is not None or step > self.schedule.end:
            self._zero()
        if step == self.schedule.end:
            self._running = {key: {} for key in _RUNNING}
        return chosen

    def budget(self, step: int) -> int:
        """Number of ranks, over all sites, that may stay after a step."""
        return self.schedule.budget(step, self._count(), len(self.sites))

    def state(self) -> dict[str, Tensor]:
        """State of the allocator by name, to be saved with a checkpoint."""
        state = {f"{n}.{key}": t for key, every in self._running.items() for n, t in every.items()}
        state |= {f"{name}.{_KEPT}": kept for name, kept in self.kept.items()}
        return {_STEP: torch.tensor(self.last), **state}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue where :meth:`state` was taken. PSG323 if it is another model's, or damaged."""
        axes = {name: axis for site in self.sites for name, axis in site.axes.items()}
        found: dict[str, dict[str, Tensor]] = {key: {} for key in (*_RUNNING, _KEPT)}
        step = state.get(_STEP, torch.tensor(-1))
        if step.dtype != torch.int64 or step.ndim:
            raise SurgeryError("PSG323", f"'{_STEP}' is no whole number")
        for full, value in state.items():
            name, _, key = full.rpartition(".")
            if full == _STEP:
                continue
            if name not in axes or key not in found:
                raise SurgeryError("PSG323", f"there is no parameter with ranks for '{full}'")
            parameter = self.model.get_parameter(name)
            shape = parameter.shape[axes[name] :][:1] if key == _KEPT else parameter.shape
            if value.shape != shape:
                sizes = f"{list(value.shape)}, where {list(shape)} is needed"
                raise SurgeryError("PSG323", f"'{full}' has shape {sizes}")
            if (value.dtype == torch.bool) != (key == _KEPT):
                raise SurgeryError("PSG323", f"'{full}' holds {value.dtype}")
            found[key][name] = value.to(parameter.device).clone()
        for keys, names in ((_RUNNING, axes), ((_KEPT,), [site.zero for site in self.sites])):
            lacking = [f"{n}.{key}" for key in keys for n in names if n not in found[key]]
            if lacking and any(found[key] for key in keys):
                raise SurgeryError("PSG323", f"'{lacking[0]}' is missing")
        self.kept = found.pop(_KEPT)
        self._running, self.last = found, int(step)

    state_dict, load_state_dict = state, load_state  # what accelerate's checkpoints ask for

    def save(self, directory: str | Path) -> None:
        """Write the state into a directory, beside a saved surgery or a checkpoint.

        PSG602 in a directory that the model was read from, PSG603 if the system refuses.
        """
        check_places(self.model, Path(directory) / STATE)
        write_whole(Path(directory), {STATE: as_safetensors(self.state())})

    def load(self, directory: str | Path) -> None:
        """Read what :meth:`save` wrote. PSG323 if it is not there or another model's."""
        dtypes = (*FLOATS, torch.bool, torch.int64)
        self.load_state(read_tensors(Path(directory) / STATE, "PSG323", dtypes))

    @torch.no_grad()
    def _observe(self) -> None:
        """Take this step's gradients into the running means of sensitivity and uncertainty."""
        first, second = self.schedule.beta1, self.schedule.beta2
        sensitivity, uncertainty = (self._running[key] for key in _RUNNING)
        for name in (name for site in self.sites for name in site.axes):
            stored = self.model.get_parameter(name)
            parameter = whole(stored)
            zero = torch.zeros_like(parameter)
            now = zero if stored.grad is None else (parameter * whole(stored.grad)).abs()
            mean = first * sensitivity.get(name, zero) + (1 - first) * now
            spread = second * uncertainty.get(name, zero) + (1 - second) * (now - mean).abs()
            sensitivity[name], uncertainty[name] = mean, spread

    def _choose(self, step: int) -> dict[str, Tensor]:
        """The ranks that stay: the most important ones, as many as the budget has room for."""
        if not self._running[_RUNNING[0]]:
            message = f"step {step} chooses ranks, and the steps before it were not seen"
            raise SurgeryError("PSG323", message, "load the state that was saved with the training")
        scores = {site.zero: self._score(site) for site in self.sites}
        excess = self._count() - self.budget(step)
        if excess < 1:
            return {
                name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()
            }
        together = torch.cat([score.cpu() for score in scores.values()])
        threshold = together.kthvalue(excess).values.item()
        return {name: score > threshold for name, score in scores.items()}

    def _score(self, site: _Ranked) -> Tensor:
        """The importance of every rank of a site."""
        sensitivity, uncertainty = (self._running[key] for key in _RUNNING)
        scores = []
        for name, axis in site.axes.items():
            score = sensitivity[name] * uncertainty[name]
            others = [dim for dim in range(score.dim()) if dim != axis]
            scores.append(score.mean(others) if others else score)
        own, *rest = scores
        return own + torch.stack(rest).sum(0) if rest else own

    @torch.no_grad()
    def _zero(self) -> None:
        """Set the ranks that were not kept to zero."""
        if not self.kept:
            message = f"step {self.last} is after the final choice of ranks, which was not seen"
            raise SurgeryError("PSG323", message, "load the state that was saved with the training")
        for site in self.sites:
            parameter = self.model.get_parameter(site.zero)
            lost = ~self.kept[site.zero].to(parameter.device)
            shape = [1] * parameter.dim()
            shape[site.axes[site.zero]] = -1
            zeroed = whole(parameter).masked_fill(lost.reshape(shape), 0.0)
            parameter.copy_(sharded_like(zeroed, parameter))

    def _count(self) -> int:
        """How many ranks there are at all sites together."""
        parameters = ((self.model.get_parameter(s.zero), s.axes[s.zero]) for s in self.sites)
        return sum(parameter.shape[axis] for parameter, axis in parameters)


def _cuts(model: OperatedModel, name: str | None) -> list[Cut]:
    cuts = [cut for cut in model.cuts if cut.rule.ranks is not None]
    names = list(dict.fromkeys(cut.operation.name for cut in cuts))
    if not names:
        hint = "a rule says so under `ranks:`, as the shipped `adalora` does"
        raise SurgeryError("PSG321", "no adapter of the model has ranks to take away", hint)
    if name is None and len(names) > 1:
        message = f"{len(names)} adapters of the model have ranks to take away"
        raise SurgeryError("PSG321", message, f"choose one by name: {', '.join(names)}")
    chosen = names[0] if name is None else name
    if chosen not in names:
        message = f"no adapter '{chosen}' has ranks to take away"
        raise SurgeryError("PSG321", message, did_you_mean(chosen, names))
    return [cut for cut in cuts if cut.operation.name == chosen]


def _site(cut: Cut) -> _Ranked:
    assert cut.rule.ranks is not None
    axes, zero = cut.rule.ranks.axes, cut.rule.ranks.zero
    order = sorted(axes, key=lambda name: name != zero)
    return _Ranked({cut.parameters[name]: axes[name] for name in order}, cut.parameters[zero])


def _schedule(cuts: Iterable[Cut], total: int | None) -> Schedule:
    """The schedule that the rules give, which must be one for all sites. PSG322."""
    found = {_of_cut(cut, total) for cut in cuts}
    schedule = found.pop()
    if found:
        raise SurgeryError("PSG322", "the adapter's rules have different schedules")
    if schedule.total < 1:
        hint = "give the number of optimiser steps: RankAllocator(model, total=1000)"
        raise SurgeryError("PSG322", "nothing says how many steps the training has", hint)
    if not schedule.initial < schedule.end or schedule.interval < 1:
        message = (
            f"of {schedule.total} steps, {schedule.initial} at the start and {schedule.final} at "
            "the end leave none to take ranks away"
        )
        raise SurgeryError("PSG322", message)
    return schedule


def _of_cut(cut: Cut, total: int | None) -> Schedule:
    ranks: Ranks | None = cut.rule.ranks
    assert ranks is not None
    settings = cut.operation.settings
    keys = (field.name for field in fields(Schedule))
    values = {key: evaluate(getattr(ranks, key), settings) for key in keys}
    return Schedule(**{**values, "total": values["total"] or total or 0})
