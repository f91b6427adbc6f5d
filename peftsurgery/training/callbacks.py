"""Callbacks for the transformers Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from peftsurgery.arguments import checked
from peftsurgery.surgery.model.operated import OperatedModel
from peftsurgery.training.allocator import RankAllocator


class AllocateRanks(TrainerCallback):
    """Runs a :class:`RankAllocator` in a Trainer, and keeps its state in every checkpoint.

        Trainer(model=o, callbacks=[AllocateRanks(o)], ...).train(resume_from_checkpoint=True)

    Where the rules leave the number of steps open, it is the Trainer's. Raises what the allocator
    raises; PSG323 if a training is resumed from a checkpoint in another directory than the
    Trainer's own, unless ``resume`` names it.
    """

    @checked
    def __init__(
        self, model: OperatedModel, name: str | None = None, resume: str | Path | None = None
    ) -> None:
        self.model, self.name, self.resume = model, name, resume
        self.allocator: RankAllocator | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the allocator, and continue where a checkpoint was written."""
        self.allocator = RankAllocator(self.model, self.name, state.max_steps)
        if state.global_step > 0:
            self.allocator.load(self.resume or _checkpoint(args, state))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take ranks away after an optimiser step, while its gradients are there."""
        if self.allocator is not None:
            self.allocator.step(state.global_step)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the allocator's state into the checkpoint."""
        if self.allocator is not None and state.is_world_process_zero:
            self.allocator.save(_checkpoint(args, state))


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
