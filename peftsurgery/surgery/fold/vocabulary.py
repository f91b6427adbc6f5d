"""The base of a model built otherwise than its files say, as something trained on it needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from peftsurgery.capture import GraphModel, Source
from peftsurgery.capture.builds import Build, new_rows, resize, tokens_of
from peftsurgery.capture.model import capture_again
from peftsurgery.capture.tensors import tensor_names
from peftsurgery.errors import SurgeryError
from peftsurgery.surgery.applying import carried_out, learnt_by
from peftsurgery.surgery.fold.folding import fold
from peftsurgery.surgery.model.operated import OperatedModel
from peftsurgery.surgery.model.shared import unoperated


def built(model: GraphModel, build: Build) -> GraphModel:
    """Capture a model again with another vocabulary, and put its adapters on the new base.

    It is captured again. Adapters that the model has are on the new base with the values that they
    have; PSG308 for one that is as large as the old vocabulary, PSG219 if the vocabulary cannot be
    changed.
    """
    base = unoperated(model)
    if build.vocabulary is None:
        return model
    if tokens_of(base.source.module) == build.vocabulary:
        _check_rows(base, build)
        return model
    graph = capture_again(base, _source(base, build))
    if not isinstance(model, OperatedModel):
        return graph
    return carried_out(graph, model.operations, learnt_by(model))


def _check_rows(base: GraphModel, build: Build) -> None:
    """Refuse a base that has the vocabulary already, and other rows. PSG219."""
    if not build.rows or not base.source.is_readable:
        return
    base.bind()
    for name, rows in build.rows.items():
        mine = new_rows(base, name, build, rows)
        if not torch.equal(mine.cpu(), rows.to(mine.dtype)):
            raise SurgeryError(
                "PSG219",
                f"the base has {build.vocabulary} tokens already, and the last {len(rows)} rows of "
                f"'{name}' are not those of the adapter",
                "give the base as it was before its vocabulary was made larger",
            )


def _source(base: GraphModel, build: Build) -> Source:
    """The source of a base with another vocabulary: of the tensors that it has now, if any."""
    given = base.source
    whole = replace(build, kind=given.build.kind, labels=given.build.labels)
    if not isinstance(given.module, PreTrainedModel):
        kind = type(given.module).__name__
        raise SurgeryError("PSG219", f"a {kind} has no table of tokens that could be resized")
    if given.build.vocabulary is not None:
        raise SurgeryError(
            "PSG219",
            f"the model was given a vocabulary of {given.build.vocabulary} tokens before, and is "
            f"to have one of {build.vocabulary}",
            "put each adapter on a base of its own",
        )
    if given.on_meta and not base.is_bound:
        return given.resized(whole)
    plain = fold(base)
    assert isinstance(plain, PreTrainedModel)
    resize(plain, whole)
    return Source(plain, given.origin, whole, before=given)


def missing_values(model: OperatedModel) -> Iterator[str]:
    """Parameters of a base that was built otherwise which neither its files nor adapters hold."""
    source = model.source
    if source.build.kind is None and source.build.labels is None:
        return
    source.weights()
    names = tensor_names(source.module)
    held = {alias for name in model.trained for alias in names[name]}
    yield from sorted(source.missing - held)
