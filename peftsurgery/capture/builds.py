"""Builds: a base made otherwise than its files say, as what was trained on it needs.

    kind         the class: a directory of a causal language model, read as a classifier
    labels       how many labels that class has
    vocabulary   how many rows the tables of tokens have (``resize_token_embeddings``)

A build is made of the model before it is captured, and a saved surgery says which it was. Where
the vocabulary grows, ``rows`` are values for the new rows of parameters, by name. Rows that no
file has, those of ``lacking``, are as transformers starts new ones: near the mean of the others,
with the same random numbers every time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from peftsurgery.capture.randomness import kept_generators
from peftsurgery.errors import SurgeryError, did_you_mean, first_line
from peftsurgery.quiet import quiet

SEED = 0
FACTS = ("kind", "labels", "vocabulary", "stored", "lacking")


@dataclass(frozen=True)
class Build:
    """How a base differs from its files (class, labels, vocabulary); None where it follows them.

    ``stored`` is how many rows the tables have there, and ``tokenizer`` the directory that has the
    tokenizer of the new vocabulary.
    """

    kind: str | None = None
    labels: int | None = None
    vocabulary: int | None = None
    stored: int | None = None
    rows: Mapping[str, Tensor] = field(default_factory=dict, compare=False)
    lacking: tuple[str, ...] = ()
    tokenizer: Path | None = field(default=None, compare=False)

    def __bool__(self) -> bool:
        return any(value is not None for value in (self.kind, self.labels, self.vocabulary))

    def to_dict(self) -> dict[str, Any]:
        """Data for a surgery's manifest; the new rows themselves are saved beside it as tensors."""
        found = {name: getattr(self, name) for name in FACTS}
        return {name: value for name, value in found.items() if value not in (None, ())}

    @property
    def added(self) -> int:
        """Number of vocabulary rows beyond those of the files; 0 where there are fewer."""
        return max(0, (self.vocabulary or 0) - (self.stored or 0))

    @property
    def notes(self) -> Iterator[str]:
        """Sentences for the report on how the base differs from its files."""
        if self.kind is not None:
            yield f"the base is built as a {self.kind}"
        if self.labels is not None:
            yield f"the base is built with {self.labels} labels"
        if self.vocabulary is not None:
            yield f"the vocabulary has {self.vocabulary} tokens, where the base's has {self.stored}"
        for name in self.lacking:
            first = self.stored or 0
            which = f"rows {first} to {first + self.added - 1} of '{name}'"
            yield f"{which} are in no file: they start near the mean of the others"


FILES = Build()


def class_named(name: str, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of transformers of that name. PSG218 if there is none for such a config."""
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        known = [key for key in dir(transformers) if "For" in key or key.endswith("Model")]
        message = f"transformers has no model class '{name}'"
        raise SurgeryError("PSG218", message, did_you_mean(name, known))
    wanted = getattr(found, "config_class", None)
    if wanted is not None and not isinstance(config, wanted):
        message = f"a {name} is not made of the config of a '{config.model_type}'"
        raise SurgeryError("PSG218", message, "name a class of the base's own architecture")
    return found


def tables(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose parameters have a row for each token of the vocabulary, by path.

    They are what transformers calls the input and the output embeddings, under all their names,
    and what is tied to them.
    """
    if not isinstance(model, PreTrainedModel):
        return {}
    found: list[nn.Module] = []
    for ask in (model.get_input_embeddings, model.get_output_embeddings):
        try:
            found.append(ask())
        except (AttributeError, NotImplementedError):
            continue  # a model without such a table
    weights = {id(t.weight) for t in found if isinstance(getattr(t, "weight", None), nn.Parameter)}
    return {
        path: part
        for path, part in model.named_modules(remove_duplicate=False)
        if path and id(part._parameters.get("weight")) in weights
    }


def tokens_of(model: nn.Module) -> int | None:
    """How many rows the table of the input's tokens has; None for a model without one."""
    for part in tables(model).values():
        if isinstance(part, nn.Embedding):
            return len(part.weight)
    return None


def resize(model: PreTrainedModel, build: Build) -> None:
    """Give a model, in place, the vocabulary of a build. PSG219 if its class cannot change it.

    Parameters of other modules are left alone, whichever memory they share.
    """
    if build.vocabulary is None:
        return
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    gpus = {parameter.device.index for parameter in model.parameters() if parameter.is_cuda}
    # one by one: torch.manual_seed reaches devices not in use, for good
    generators = (torch.default_generator, *(torch.cuda.default_generators[i] for i in gpus))
    try:
        with quiet(), kept_generators(), torch.no_grad():
            for generator in generators:
                generator.manual_seed(SEED)
            model.resize_token_embeddings(build.vocabulary, mean_resizing=not on_meta)
    except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise _unresized(model, build, first_line(error)) from error
    if tokens_of(model) != build.vocabulary:
        raise _unresized(model, build, "its table stays as it was")
    if not on_meta:
        _put_rows(model, build)


@torch.no_grad()
def _put_rows(model: PreTrainedModel, build: Build) -> None:
    """Copy the known new rows behind those that the files have."""
    for name, rows in build.rows.items():
        new_rows(model, name, build, rows).copy_(rows)


def new_rows(model: nn.Module, name: str, build: Build, rows: Tensor) -> Tensor:
    """The place of a parameter's new rows. PSG219 if it has none of the shape of ``rows``."""
    parameter = dict(model.named_parameters(remove_duplicate=False)).get(name)
    shape = () if parameter is None or not parameter.dim() else parameter.shape[1:]
    if parameter is None or tuple(rows.shape) != (build.added, *shape):
        wanted = "no such parameter" if parameter is None else f"{build.added} rows of {[*shape]}"
        message = f"there are rows of the shape {[*rows.shape]} for '{name}': the base has {wanted}"
        raise SurgeryError("PSG219", message, "they are of another base")
    return parameter.detach()[len(parameter) - build.added :]


def labels_for(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Number of labels a model needs to hold parameters of these shapes; None if it fits as it is.

    Those are meant whose first dimension is the number of labels that the config gives, and is
    another in ``shapes``.
    """
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    if not isinstance(model, PreTrainedModel) or labels is None:
        return None
    wanted = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        mine, given = tuple(parameter.shape), tuple(shapes.get(name, ()))
        if mine and given and mine[0] == labels != given[0] and mine[1:] == given[1:]:
            wanted.add(given[0])
    return wanted.pop() if len(wanted) == 1 else None


def _unresized(model: nn.Module, build: Build, why: str) -> SurgeryError:
    kind = type(model).__name__
    message = f"the vocabulary of a {kind} cannot be made {build.vocabulary} tokens: {why}"
    return SurgeryError("PSG219", message, "capture a model that has that vocabulary already")
