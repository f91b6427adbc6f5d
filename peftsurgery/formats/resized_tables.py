"""What a fold on files does to the tables of a base whose vocabulary an adapter resizes.

The base's rows stay, and those of the build follow them, or the table is cut off. Its config says
how many there are now.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from peftsurgery.capture.tensors import tensor_names
from peftsurgery.checkpoint.model_plan import IN_MEMORY, ModelPlan
from peftsurgery.errors import SurgeryError
from peftsurgery.model_files import ModelFiles
from peftsurgery.surgery.model.operated import OperatedModel


def new_rows(model: OperatedModel) -> dict[str, Tensor]:
    """The rows that follow those of the base's files, by the parameter; none if it is as there."""
    return dict(model.source.build.rows) if model.source.build.vocabulary is not None else {}


def name_of(parameter: str) -> str:
    """What the new rows of a parameter are called among the tensors of an adapter."""
    return f"{parameter}.new_rows"


def resized(
    model: OperatedModel, rows: Mapping[str, Tensor], files: ModelFiles, made: ModelPlan
) -> dict[str, tuple[int, str | None]]:
    """The number of rows of each parameter that is resized, and the tensor of the new ones.

    ``made`` is the plan for the model, which knows what the ``files`` call a parameter. Raises
    PSG416 for rows that are in no file, and start at random.
    """
    module, build, held = model.source.module, model.source.build, files.tensors
    found, names = dict[str, tuple[int, str | None]](), tensor_names(module)
    parameters = module.named_parameters(remove_duplicate=False)
    for name, parameter in parameters if build.vocabulary is not None else ():
        alike = names[name]
        stored = next(filter(None, (made.spelled(each, held) for each in alike)), None)
        if stored is None or held[stored][1].shape[:1] == parameter.shape[:1]:
            continue
        known = next(
            (each for each in reversed([*rows]) if each in alike), None
        )  # the last is kept
        if known is None and build.added and name not in model.trained:
            why = f"the new rows of '{name}' are in no file, and start near the mean of the others"
            raise SurgeryError("PSG416", why, IN_MEMORY)
        found[name] = (len(parameter), None if known is None else name_of(known))
    return found


def config_changes(model: OperatedModel) -> dict[str, Any]:
    """The values of the config that a new vocabulary changes, by dotted paths."""
    source, wanted = model.source, model.source.build.vocabulary
    if wanted is None or source.stored is None:
        return {}
    assert isinstance(source.module, PreTrainedModel)
    old = dict(_values(source.stored.to_dict()))
    now = _values(source.module.config.to_dict())
    return {path: value for path, value in now if value == wanted and old.get(path) != value}


def _values(said: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in said.items():
        if isinstance(value, dict):
            yield from _values(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
