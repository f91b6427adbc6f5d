"""``peftsurgery export``: write what was sewn in for another program to read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
from peftsurgery.outputs import check_free
from peftsurgery.places import check_apart

if TYPE_CHECKING:
    from peftsurgery.surgery.model.operated import OperatedModel

ADAPTERS = {
    "peft": "an adapter's directory for peft",
    "adapterhub": "an adapter's directory for AdapterHub's library",
    "vllm": "an adapter's directory for vLLM",
    "gguf": "an adapter's file for llama.cpp",
    "mlx": "an adapter's directory for mlx-lm",
    "kohya": "an adapter's file for diffusers and other image tools",
    "ort-adapter": "an adapter's file for onnxruntime, for a model of `onnx --adapters inputs`",
}
FORMATS = {
    **ADAPTERS,
    "onnx": "a model with the active adapters in it, checked in onnxruntime",
    "pt2": "a program of torch.export with the active adapters in it, checked by loading it",
}


@click.command(epilog="Formats: " + "; ".join(f"{name}, {what}" for name, what in FORMATS.items()))
@click.argument("surgery")
@click.option("--to", "to", type=click.Choice(list(FORMATS)), required=True, help="The format.")
@output_option()
@name_option("Which adapter, if there are several.")
@click.option(
    "--as-lora",
    metavar="RANK|ENERGY",
    help="Turn what the adapter changes into a plain LoRA: of at most a rank (16), by the share of "
    "each change's energy that is kept (0.99), or of the rank that each needs (1.0).",
)
@click.option(
    "--adapters",
    type=click.Choice(["fold", "inputs"]),
    help="For onnx and pt2: fold the adapters into the weights (onnx: as without it). For onnx: "
    "have their tensors as inputs that may be left out.",
)
@click.option(
    "--cache", is_flag=True, help="For onnx: keys and values of past tokens go in and out."
)
@click.option("--base", metavar="DIR", help="The base model, if it is not where it was.")
@other_base_option
@force_option
@json_option
def export(
    surgery: str,
    to: str,
    out: Path,
    name: str | None,
    as_lora: str | None,
    adapters: Literal["fold", "inputs"] | None,
    cache: bool,
    base: str | None,
    allow_other_base: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write the adapter of SURGERY, a saved one or a directory of peft's, to OUT for a program."""
    wish = _wish(as_lora)
    if to != "onnx" and (adapters == "inputs" or cache or (adapters and to in ADAPTERS)):
        raise click.UsageError("--adapters inputs and --cache are for --to onnx, fold for pt2 too")
    inputs = [surgery, *([base] if base else [])]
    check_apart(out, inputs)
    if to == "onnx":
        check_free(out, inputs, force)
    about: dict[str, Any] = {}
    with doing(f"opening {surgery}"):
        operated = _opened(surgery, base, allow_other_base)
        if name is not None and (wish is not None or to not in ADAPTERS):
            operated.choose(name)
        if wish is not None:
            from peftsurgery.surgery.fold.as_lora import lora_with_error

            operated, errors = lora_with_error(operated, **wish)
            about["lora"] = {weight: asdict(error) for weight, error in errors.items()}
            name = None
    with doing(f"writing {out}"):
        if to in ADAPTERS:
            about |= _written(operated, to, out, name, force)
        elif to == "pt2":
            about |= _program(operated, out, adapters == "fold", force)
        else:  # it is written beside OUT and takes its name, with its data if they are apart
            from peftsurgery.formats.onnx.export import export_onnx

            about |= export_onnx(operated, out, adapters or "fold", cache).to_dict()
    found = [*_notes(operated), *about.pop("notes", ())]
    notes = list(dict.fromkeys(found))
    words = "\n".join([f"{out}: {FORMATS[to]}", *(f"note: {note}" for note in notes)])
    said = {"schema": "peftsurgery.export/1", "format": to, "out": str(out), **about}
    print_result({**said, "notes": notes}, words, as_json)


def _wish(given: str | None) -> dict[str, Any] | None:
    """The rank or the energy that is asked for; None for none."""
    if given is None:
        return None
    try:
        return {"rank": int(given)} if given.isdecimal() else {"energy": float(given)}
    except ValueError:
        message = f"'{given}' is neither a rank (16) nor a share of the energy (0.99)"
        raise click.BadParameter(message, param_hint="--as-lora") from None


def _opened(surgery: str, base: str | None, allow_other_base: bool) -> OperatedModel:
    from peftsurgery.formats.pretrained import open_adapter

    return open_adapter(Path(surgery), base, allow_other_base)


def _notes(operated: OperatedModel) -> Iterator[str]:
    from peftsurgery.surgery.plan.cut import notes_of

    yield from notes_of(operated.operations)
    for name, lost in operated.report.lost.items():
        yield f"'{name}' lacks {lost:.2%} of the change that it was made of"


def _program(operated: OperatedModel, out: Path, folded: bool, force: bool) -> dict[str, Any]:
    from peftsurgery.formats.pt2.export import export_pt2

    made = export_pt2(operated, out, "fold" if folded else "keep", force)
    return {**made.to_dict(), "notes": made.notes}


def _written(
    operated: OperatedModel, to: str, out: Path, name: str | None, force: bool
) -> dict[str, Any]:
    from peftsurgery.formats.export_adapter import TARGETS

    notes = TARGETS[to.partition("-")[0]](operated, out, name, force)
    inside = (str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())
    return {"files": sorted(inside) or [out.name], "notes": list(notes)}
