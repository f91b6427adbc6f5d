"""load and its kin: a saved surgery, or what a command names, opened as a captured model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from peftsurgery.arguments import checked
from peftsurgery.capture import GraphModel, capture, open_source
from peftsurgery.capture.builds import Build, tokens_of
from peftsurgery.capture.model import capture_source
from peftsurgery.capture.tensors import persistent_buffers
from peftsurgery.errors import SurgeryError
from peftsurgery.surgery.applying import check_covered, operate
from peftsurgery.surgery.fold.vocabulary import built
from peftsurgery.surgery.model.moved_buffers import put_buffers
from peftsurgery.surgery.model.operated import OperatedModel
from peftsurgery.surgery.model.same_base import check_base, compare_base
from peftsurgery.surgery.model.saved.manifest import (
    Manifest,
    check_learnt,
    is_surgery,
    read_learnt,
    read_manifest,
)


@checked
def load(
    path: str | Path,
    base: GraphModel | nn.Module | str | None = None,
    allow_other_base: bool = False,
) -> OperatedModel:
    """Load a saved surgery onto ``base``, or onto the model that it was made for.

    ``base`` is a captured model, a transformers model, or what the command line takes for MODEL.
    An operated model gets the saved adapters besides its own. The base's weights are compared with
    those that the surgery was saved on, by their fingerprints; ``allow_other_base`` takes others
    too, and the report says so. Raises PSG605 or PSG606 if the files are damaged, PSG311 if they do
    not fit the base, PSG319 if its weights are others, PSG304 if it has an adapter of the same
    name.
    """
    return load_on(Path(path), base, allow_other_base)


def load_on(
    folder: Path,
    base: GraphModel | nn.Module | str | None = None,
    allow_other_base: bool = False,
    kind: str | None = None,
) -> OperatedModel:
    """:func:`load`, with the base in the class ``kind`` of transformers instead of its own."""
    manifest, tensors = read_manifest(folder), read_learnt(folder)
    build = manifest.build if kind is None else replace(manifest.build, kind=kind)
    graph = _base(manifest, base, build, allow_other_base)
    names = manifest.adapters
    taken = {*names}.intersection(graph.adapters) if isinstance(graph, OperatedModel) else ()
    if taken:
        hint = f"take the old one out first: eject(model, '{min(taken)}')"
        raise SurgeryError("PSG304", f"the model has an adapter '{min(taken)}' already", hint)
    compared = compare_base(manifest.made_for(tensors), graph.source)
    operations = [replace(op, origin=op.origin.read(compared)) for op in manifest.operations]
    given = tensors, manifest.active, manifest.left_out, manifest.lost
    operated = operate(graph, operations, *given)
    operated.take_names(tensors, names)
    buffers = {name: tensors.pop(name) for name in persistent_buffers(operated) if name in tensors}
    if buffers:
        operated.bind()
        put_buffers(persistent_buffers(operated), buffers)
    learnt = operated.learnt(*names)
    check_covered(str(folder), learnt.keys(), tensors.keys())
    check_learnt(folder, tensors, learnt)
    check_base(compared, graph.source, allow_other_base)
    return operated


def _base(manifest: Manifest, given: Any, build: Build, allow_other_base: bool) -> GraphModel:
    """Base of a surgery: the given one, or that of the manifest. Raises PSG311 for neither."""
    named = manifest.base if given is None else given
    if named is None:
        message = f"'{manifest.path}' does not say what it was made for"
        raise SurgeryError("PSG311", message, "give base=")
    if isinstance(named, str | Path):
        return open_built(str(named), build, allow_other_base)
    return built(named if isinstance(named, GraphModel) else capture(named), build)


def open_built(spec: str, build: Build, allow_other_base: bool = False) -> GraphModel:
    """What MODEL names, captured as a build of it. PSG218 and PSG219 if it cannot be that."""
    if is_surgery(Path(spec)):
        if build.kind is not None:
            message = f"'{spec}' is a surgery, which says itself of which class its base is"
            raise SurgeryError("PSG218", message, "name the directory of the base")
        return built(load(spec, allow_other_base=allow_other_base), build)
    source = open_source(spec, build)
    other = build.vocabulary is not None and tokens_of(source.module) != build.vocabulary
    if other and source.on_meta and tokens_of(source.module) is not None:
        source = source.resized(build)
    return built(capture_source(source), build)


def open_model(spec: str, allow_other_base: bool = False) -> GraphModel:
    """What MODEL names on the command line: a saved surgery, or a model to capture.

    PSG319 for a surgery whose base has other weights by now, unless that is allowed.
    """
    if is_surgery(Path(spec)):
        return load(spec, allow_other_base=allow_other_base)
    return capture(spec)


def open_base(spec: str) -> GraphModel:
    """What MODEL names, captured; of a saved surgery its base, without what is saved."""
    path = Path(spec)
    if not is_surgery(path):
        return capture(spec)
    manifest = read_manifest(path)
    return _base(manifest, None, manifest.build, True)
