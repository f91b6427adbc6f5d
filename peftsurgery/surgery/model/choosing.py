"""Models whose calls choose among adapters.

activate, deactivate, choose    the model's own choice, for all threads
only, rows, merged              that of a block of code, for its thread or async task alone
merge, unmerge                  whether the model's own choice is served from merged weights
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

from torch import Tensor

from peftsurgery.capture import GraphModel
from peftsurgery.errors import SurgeryError
from peftsurgery.surgery.model.adapters import Adapters
from peftsurgery.surgery.model.choices import Choice
from peftsurgery.surgery.model.merged import MergedWeights, check_evaluated, check_mergeable, gone
from peftsurgery.surgery.model.rewriting import Rewriting
from peftsurgery.surgery.model.shared import SharedModel
from peftsurgery.surgery.plan.fusion import taking_part
from peftsurgery.surgery.plan.mode import Mode
from peftsurgery.surgery.rewrite.folded_weights import Foldable, folded_weights


class ChoosingModel(SharedModel):
    """Captured model with adapters, some of which take part in a call."""

    def __init__(self, model: GraphModel, rewriting: Rewriting) -> None:
        super().__init__(model, rewriting.first)
        self._rewriting = rewriting
        self._adapters = Adapters(rewriting.first, self._copies)
        self._merged = MergedWeights()

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of all adapters, in the order they were applied."""
        return self._adapters.names

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters that take part in a call, in the order they were applied."""
        return self._adapters.mode.names

    @property
    def left_out(self) -> dict[str, list[int | str]]:
        """The layers in which an adapter does nothing whenever it takes part, by its name."""
        return {name: list(layers) for name, layers in self._adapters.mode.left_out}

    def activate(self, *names: str, leave_out: Iterable[int | str] = ()) -> None:
        """Activate adapters, all if none is named. Raises PSG310, PSG312.

        This is the model's own choice, for all threads, but for calls that choose by themselves.
        The adapters do nothing in the layers to ``leave_out``, written as in a rule's `where` (0,
        "..4"), until they are activated again: AdapterDrop (Rücklé et al., 2021, arXiv:2010.11918).
        """
        before = self._adapters.default
        wanted = self._adapters.known(names) or self.adapters
        left_out = dict.fromkeys(wanted, tuple(leave_out))
        self._choose(self._adapters.mode_with(before, {*before.names, *wanted}, left_out))

    def deactivate(self, *names: str) -> None:
        """Deactivate adapters, all (so the base) if none is named. Raises PSG310.

        As :meth:`activate`, for the model's own choice.
        """
        before = self._adapters.default
        unwanted = self._adapters.known(names) or self.adapters
        self._choose(self._adapters.mode_with(before, {*before.names}.difference(unwanted)))

    def choose(self, *names: str) -> None:
        """Activate exactly these adapters; none for the base. Raises PSG310, PSG312.

        As :meth:`activate`, for the model's own choice, but layers that are left out stay left out.
        """
        self._choose(self._adapters.mode_with(self._adapters.default, names))

    @contextmanager
    def only(self, *names: str) -> Iterator[None]:
        """Use exactly these adapters within the context; ``only()`` is the base. PSG310, PSG312.

        That is so for calls of this thread, or of this async task, and for no others.
        """
        mode = self._adapters.mode_with(self._adapters.mode, names)
        self._check(mode)
        with self._adapters.choosing(self, mode):
            yield

    def rows(self, names: Sequence[str | None]) -> AbstractContextManager[None]:
        """Use, within the context, the adapter named for each row of a batch; None is the base.

        That is so for calls of this thread, or of this async task. Rows are those of the first
        input's first axis. A batch of k times as many rows is taken for one in which each row was
        repeated k times in a row, as ``generate`` repeats them for beams and samples; any other is
        refused (PSG314). Which adapters are active makes no difference, and what is inactive is not
        trained. PSG310 for an unknown name, PSG313 where an adapter changes what the rows share.
        """
        return self._adapters.choices.within(self._adapters.choice(names))

    def _choose(self, mode: Mode) -> None:
        """Let the model choose a mode from now on; nothing has changed if it cannot be."""
        self._check(mode)
        before = self._adapters.default
        if mode.merged:
            self._merged.hold(self, mode, gone)
        self._adapters.choose(self, mode)
        if before.merged:
            self._merged.release(self, before)

    def _check(self, mode: Mode) -> None:
        """Refuse a mode that cannot be run. PSG312 for two copies of one parameter."""
        self._copies.check(mode.replacing)
        first = self.base_capture
        changed = self._rewriting.inputs.changed_in(mode)
        self._served(
            self._rewriting.inputs.planned(first, self.original_capture) if changed else first, mode
        )

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Serve calls of this thread, or of this async task, from weights with the adapters in.

        Within the context the active adapters cost nothing: their folds are in copies of the
        weights they change (fp32, rounded once; packed ones unpacked), made when the outermost
        context is entered. The base's own tensors are never touched, so leaving it is exact, and
        what is saved or folded within is the same as ever. A call inside that names its adapters
        is a call as usual. PSG355 in training, PSG401, PSG402, PSG403, PSG405 and PSG408 as for
        a fold.
        """
        choices = self._adapters.choices
        with self._merging(self._adapters.mode) as mode, choices.within(Choice(mode)):
            yield

    def merge(self) -> None:
        """Let the model's own choice be served as within :meth:`merged`, for all threads.

        Until :meth:`unmerge`, or until adapters are activated, deactivated or chosen.
        """
        with self._merging(self._adapters.default) as mode:
            self._choose(mode)

    def unmerge(self) -> None:
        """Undo :meth:`merge`; nothing to do for a model that is not merged."""
        self._choose(replace(self._adapters.default, merged=False))

    @contextmanager
    def _merging(self, mode: Mode) -> Iterator[Mode]:
        """Hold the merged weights of a mode within the context; gives the merged mode. PSG355."""
        check_mergeable(self)
        merged = replace(mode, merged=True)

        def weights() -> dict[str, Tensor]:
            self.bind()
            folded = folded_weights(self.foldable(mode=mode))
            return {name: weight.value for weight in folded for name in weight.names}

        with self._merged.within(self, merged, weights):
            yield merged

    def _running(self, mode: Mode) -> AbstractContextManager[None]:
        """Keep what a call in a mode reads until the call has ended. PSG355."""
        if not mode.merged:
            return nullcontext()
        check_evaluated(self)
        return self._merged.within(self, mode, gone)

    def foldable(self, whole: Collection[str] = (), mode: Mode | None = None) -> Foldable:
        """What a fold of the active adapters reads, or of those of a mode.

        ``whole`` names weights to be given even if no cut changes them. PSG401 where the rows of a
        batch have weights of their own.
        """
        mode = self._adapters.mode if mode is None else mode
        if mode.by_row:
            raise SurgeryError("PSG401", "each row has its own weights", "leave rows(...) to fold")
        return Foldable(
            taking_part(self._plan.cuts, mode),
            self._plan.sites,
            lambda name: self._read(mode.replacing, name).detach(),
            self.tensor,
            whole,
            self.stored,
            self._unread,
        )
