"""The names of another program's tensors: which module, which factor, which model of a pipeline.

Programs differ in what they call the two factors of a module's change and in how they spell the
module's path; ``library.yaml`` has their words. Which of them a file uses, its names tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.files import absence
from peftsurgery.formats.foreign.layout import laid_out_otherwise
from peftsurgery.formats.foreign.library import foreign_words
from peftsurgery.tensor_file import Tensor, TensorFile, read_header

KNOWN = "known are kohya's trainer, LyCORIS, diffusers and mlx-lm; peft's are read as they are"


@dataclass(frozen=True)
class Spelling:
    """How a program calls a module's tensors: which parts they are, by the ends of their names.

    ``kind`` is what a module's change is: a product of factors, or another of ``lycoris.py``.
    ``turned`` factors are (in, rank) and (rank, out); ``as_peft`` has peft's shapes.
    """

    tensors: Mapping[str, str]
    kind: str = "product"
    turned: bool = False
    as_peft: bool = False

    def of(self, name: str) -> tuple[str, str] | None:
        """The module that a tensor's name says, and the part: down, up, alpha or another."""
        for suffix, part in self.tensors.items():
            if name.endswith(f".{suffix}"):
                return name.removesuffix(f".{suffix}"), part
        return None

    def suffix(self, part: str) -> str:
        """What a part is called."""
        return next(suffix for suffix, known in self.tensors.items() if known == part)


def spelling_of(names: Iterable[str]) -> Spelling | None:
    """The spelling that most of the names have; None if none has one that is known."""
    known = [Spelling(**words) for words in foreign_words()["spellings"]]
    counts = [sum(one.of(name) is not None for name in names) for one in known]
    most = max(counts)
    return known[counts.index(most)] if most else None


def foreign_file(source: Path) -> Path:
    """The file of an adapter's tensors. PSG505 if there is none, PSG511 if it could be several."""
    if not source.is_dir():
        return source
    names = sorted(path.name for path in source.glob("*.safetensors"))
    usual = [name for name in names if name in foreign_words()["files"]] or names
    if len(usual) > 1:
        message = f"'{source}' holds {', '.join(usual)}"
        raise SurgeryError("PSG511", message, "name the file that is meant")
    if not usual:
        raise SurgeryError("PSG505", absence(source, "*.safetensors"), "pickles are never loaded")
    return source / usual[0]


def import_hint(source: Path) -> str | None:
    """What to do with a path that holds another program's LoRA; None for anything else."""
    try:
        names = read_header(foreign_file(source), "PSG505").tensors
    except SurgeryError:
        return None
    is_one = spelling_of(names) is not None
    return "it is another program's LoRA: `peftsurgery import` reads it" if is_one else None


@dataclass(frozen=True)
class ForeignNames:
    """The tensors of a file by what their names say. PSG520, PSG523 for names that say nothing."""

    file: TensorFile

    @cached_property
    def spelling(self) -> Spelling:
        """The spelling that most of the names have."""
        found = spelling_of(self.file.tensors)
        if found is None:
            first = next(iter(self.file.tensors), None)
            what = (
                "holds no tensors" if first is None else f"has '{first}', and no such LoRA is known"
            )
            raise SurgeryError("PSG523", f"{self.file.path} {what}", KNOWN)
        return found

    @cached_property
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The tensors by the names of modules, then by what they are there."""
        found, spelling = dict[str, dict[str, Tensor]](), self.spelling
        for name, tensor in self.file.tensors.items():
            said = spelling.of(name)
            if said is None:
                message = f"{self.file.path} is of no plain LoRA: it has '{name}'"
                raise SurgeryError(
                    "PSG520", message, f"{', '.join(spelling.tensors)} are what is read"
                )
            found.setdefault(said[0], {})[said[1]] = tensor
        return found

    def parts(self, paths: Iterable[str]) -> dict[str, dict[str, str]]:
        """For each model of a pipeline the names of its modules, each with what it begins with.

        A name that is one of the base's ``paths``, or has no beginning that is known, is of the
        part "".
        """
        beginnings = {b: part for part, words in foreign_words()["parts"].items() for b in words}
        found, own = dict[str, dict[str, str]](), set(paths)
        for name in self.tensors:
            fitting = [] if name in own else [b for b in beginnings if name.startswith(b)]
            beginning = fitting[0] if fitting else ""
            found.setdefault(beginnings.get(beginning, ""), {})[name] = beginning
        return found


@dataclass(frozen=True)
class ForeignPart:
    """The names that are for one model, each with what it begins with, and the model's modules."""

    names: Mapping[str, str]
    modules: tuple[str, ...]

    @cached_property
    def spelled(self) -> dict[str, set[str]]:
        """The paths of the modules by how they may be spelled with dots.

        A path that is another's other spelling keeps its own meaning.
        """
        former = foreign_words()["former"]
        others = [
            *((path.removeprefix(former), path) for path in self.modules),
            *((former + path, path) for path in self.modules),
            *((spelled, path) for path, spelled in laid_out_otherwise(self.modules).items()),
        ]
        found, own = {path: {path} for path in self.modules}, set(self.modules)
        for spelled, path in others:
            if spelled not in own:
                found.setdefault(spelled, set()).add(path)
        return found

    @cached_property
    def joined(self) -> dict[str, set[str]]:
        """The paths of the modules by how they may be spelled with _ for each dot."""
        found: dict[str, set[str]] = {}
        for spelled, paths in self.spelled.items():
            found.setdefault(spelled.replace(".", "_"), set()).update(paths)
        return found

    def placed(self) -> dict[str, str]:
        """The module for each name. PSG506 if a name means none, or two; PSG507 if two mean one."""
        found: dict[str, str] = {}
        for name, beginning in self.names.items():
            path = self._meant(name, name.removeprefix(beginning), beginning.endswith("_"))
            if path in found:
                raise SurgeryError("PSG507", f"'{found[path]}' and '{name}' both mean '{path}'")
            found[path] = name
        return {name: path for path, name in found.items()}

    def _meant(self, name: str, rest: str, is_joined: bool) -> str:
        known = self.joined if is_joined else self.spelled
        meant = sorted(known.get(rest, ()))
        if len(meant) == 1:
            return meant[0]
        what = f"both {' and '.join(meant)}" if meant else "no linear, convolution or embedding"
        raise SurgeryError(
            "PSG506", f"'{name}' means {what} of the base", did_you_mean(rest, known)
        )
