"""Rule files: shipped ones by name, others by path, or from text."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from peftsurgery.arguments import checked
from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.language.document import MAX_BYTES, Document, read_document
from peftsurgery.language.schema import RuleFile
from peftsurgery.language.strict import complaint

_PACKAGE = Path(__file__).resolve().parent.parent


@checked
def parse_rules(text: str | bytes, source: str = "<text>") -> RuleFile:
    """Parse the text of a rule file, and check it against the schema and for unknown names.

    Every error is a SurgeryError that names ``source``, line and column.
    """
    document = read_document(text, source)
    try:
        return RuleFile.model_validate(document.data)
    except ValidationError as error:
        raise _translate(error, document) from None


@checked
def load_rules(name: str | Path) -> RuleFile:
    """Load a shipped rule file by name (``lora_qv``), or any by path. Raises PSG107 for none."""
    known = shipped()
    path = known.get(str(name), Path(name))
    try:
        if path.is_file():
            with path.open("rb") as file:
                content = file.read(MAX_BYTES + 1)
            rules = parse_rules(content, str(name if str(name) in known else path))
            return rules.read_from(path.absolute())
        exists = path.exists()
    except OSError as error:
        raise SurgeryError("PSG107", f"cannot read '{name}': {error.strerror}") from None
    if exists:
        raise SurgeryError("PSG107", f"'{name}' is not a regular file")
    hint = did_you_mean(str(name), known)
    raise SurgeryError("PSG107", f"there is no rule file '{name}'", hint)


def shipped() -> dict[str, Path]:
    """The rule files that come with the package, by name."""
    installed, checkout = _PACKAGE / "rules", _PACKAGE.parent / "rules"
    folder = installed if installed.is_dir() else checkout
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _translate(error: ValidationError, document: Document) -> SurgeryError:
    """Translate pydantic's first error into a coded one, with key, expectation and position."""
    path, message = complaint(error)
    known: tuple[str | int, ...] = ()
    for step in path:  # a union's branches appear in the path, but not in the document
        if (*known, step) in document.places:
            known = (*known, step)
    name = "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in known).lstrip(".")
    where = str(document.place(known))
    return SurgeryError("PSG106", f"{name or 'the file'}: {message}", None, where)
