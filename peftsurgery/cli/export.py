"""``peftsurgery export``: write what was sewn in for another program to read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peftsurgery.cli.kit import (
    force_option,
    json_option,
    name_option,
    other_base_option,
    output_option,
    print_result,
)
from peftsurgery.cli.progress import doing
from peftsurgery.outputs import check_free, fresh

if TYPE_CHECKING:
    from peftsurgery.surgery.model.operated import OperatedModel

FORMATS = {
    "peft": "an adapter's directory for peft",
    "adapterhub": "an adapter's directory for AdapterHub's library",
    "onnx": "a file with the active adapters folded in, checked in onnxruntime",
}


@click.command(epilog="Formats: " + "; ".join(f"{name}, {what}" for name, what in FORMATS.items()))
@click.argument("surgery")
@click.option("--to", "to", type=click.Choice(list(FORMATS)), required=True, help="The format.")
@output_option()
@name_option("Which adapter, if there are several.")
@click.option("--base", metavar="DIR", help="The base model, if it is not where it was.")
@other_base_option
@force_option
@json_option
def export(
    surgery: str,
    to: str,
    out: Path,
    name: str | None,
    base: str | None,
    allow_other_base: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write the adapter of a saved SURGERY to OUT in the format of another library."""
    inputs = [surgery, *([base] if base else [])]
    check_free(out, inputs, force)
    with doing(f"opening {surgery}"):
        from peftsurgery.surgery.loading import load
        from peftsurgery.surgery.plan.cut import notes_of

        operated = load(surgery, base, allow_other_base)
        if name is not None and to == "onnx":
            operated.choose(name)
    with doing(f"writing {out}"):
        if to == "onnx":
            about = _write_onnx(operated, out)
        else:
            with fresh(out, inputs, force) as part:
                about = _write_adapter(operated, to, part, name)
    notes = list(dict.fromkeys([*notes_of(operated.operations), *about.get("notes", ())]))
    words = "\n".join([f"{out}: {FORMATS[to]}", *(f"note: {note}" for note in notes)])
    print_result({"format": to, "out": str(out), **about, "notes": notes}, words, as_json)


def _write_adapter(
    operated: OperatedModel, to: str, part: Path, name: str | None
) -> dict[str, Any]:
    from peftsurgery.formats.adapterhub.directory import to_adapterhub
    from peftsurgery.formats.peft.directory import to_peft

    notes = {"peft": to_peft, "adapterhub": to_adapterhub}[to](operated, part, name)
    files = sorted(str(file.relative_to(part)) for file in part.rglob("*") if file.is_file())
    return {"files": files, "notes": list(notes or ())}


def _write_onnx(operated: OperatedModel, out: Path) -> dict[str, Any]:
    # it is written beside OUT and takes its name, with its data if they are apart
    from peftsurgery.formats.onnx.export import export_onnx

    return export_onnx(operated, out).to_dict()
