"""Rule files: shipped ones by name, others by path, or from text."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import ValidationError

from peftsurgery.arguments import checked
from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.language.base import check_read, joined, laid_over
from peftsurgery.language.document import MAX_BYTES, Document, read_document
from peftsurgery.language.on_base import on_base
from peftsurgery.language.position import position_of
from peftsurgery.language.rule_file import RuleFile
from peftsurgery.language.shipped import shipped
from peftsurgery.language.strict import refusal

MAX_SOURCES = 16


@checked
def parse_rules(text: str | bytes, source: str = "<text>") -> RuleFile:
    """Parse the text of a rule file, and check it against the schema and for unknown names.

    A base is looked for by its shipped name, or by a path as seen from the working directory. Every
    error is a SurgeryError that names ``source``, line and column.
    """
    return _rule_file(read_document(text, source), Path(), ())


@checked
def load_rules(name: str | Path) -> RuleFile:
    """Load a shipped rule file by name (``lora_qv``), or any by path. Raises PSG107 for none.

    A file that stands on others is laid over them: PSG108 if it stands on itself, PSG109 for a
    change of a rule that its base does not have, PSG117 for a setting of its base that nothing
    reads any more, PSG118 for a name that two of them mean different things by.
    """
    path = shipped().get(str(name), Path(name))
    return _rule_file(_read(path, str(name)), path.parent, (path.absolute(),))


def page_of(name: str | Path) -> str:
    """Text of a rule file that stands by itself, with its base's rules if it has one."""
    path = shipped().get(str(name), Path(name))
    if on_base(_read(path, str(name))) is not None:
        return dump_rules(load_rules(name), compact=True)
    return path.read_text(encoding="utf-8")


def dump_rules(file: RuleFile, compact: bool = False) -> str:
    """A rule file as YAML text that reads back as the same rules.

    ``compact`` puts lists and mappings of plain values on one line each.
    """
    data = file.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    style = None if compact else False
    return yaml.safe_dump(
        data, sort_keys=False, allow_unicode=True, width=100, default_flow_style=style
    )


def _rule_file(document: Document, folder: Path, sources: tuple[Path, ...]) -> RuleFile:
    """Parse a document's rules, laid over its bases'."""
    whole, sources = _whole(document, folder, sources, sources)
    file = _checked(whole)
    check_read(document, whole)
    return file.read_from(sources)


def _checked(document: Document) -> RuleFile:
    try:
        return RuleFile.model_validate(document.data)
    except ValidationError as error:
        raise refusal(error, document) from None


def _whole(
    document: Document, folder: Path, above: tuple[Path, ...], sources: tuple[Path, ...]
) -> tuple[Document, tuple[Path, ...]]:
    """A document laid over its bases, each whole in its turn, and the files that were read so far.

    ``above`` are the document's own file and those that stand on it; each of several bases has to
    be a rule file by itself.
    """
    said = on_base(document)
    if said is None:
        return document, sources
    bases = []
    for name in said.base:
        where = position_of(name)
        path = shipped().get(name, folder / name).absolute()
        if len(sources) >= MAX_SOURCES or path.resolve() in [file.resolve() for file in above]:
            message = f"'{name}' stands on this file, or on too many others"
            raise SurgeryError("PSG108", message, None, where)
        read = _read(path, name, where)
        base, sources = _whole(read, path.parent, (*above, path), (*sources, path))
        if len(said.base) > 1:
            _checked(base)
        bases.append(base)
    return laid_over(joined(bases, document), document, said), sources


def _read(path: Path, name: str, where: str | None = None) -> Document:
    """Read the document of a rule file by ``name``. Raises PSG107 if there is none."""
    try:
        if path.is_file():
            with path.open("rb") as file:
                content = file.read(MAX_BYTES + 1)
            return read_document(content, name)
        exists = path.exists()
    except OSError as error:
        message = f"cannot read '{name}': {error.strerror}"
        raise SurgeryError("PSG107", message, where=where) from None
    if exists:
        raise SurgeryError("PSG107", f"'{name}' is not a regular file", where=where)
    hint = did_you_mean(name, shipped())
    raise SurgeryError("PSG107", f"there is no rule file '{name}'", hint, where)
