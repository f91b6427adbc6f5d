"""What a program would refuse, ignore or misread of an adapter, told from its files alone.

What each program does is in ``programs.yaml``. No model is built and no tensor is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from peftsurgery.arguments import checked
from peftsurgery.checkpoint.lora_folder import CONFIG, PREFIX, TENSORS, read_lora_config
from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.model_files import read_model_files
from peftsurgery.tensor_file import TensorFile, read_header


@dataclass(frozen=True)
class Finding:
    """One thing that a program ``does`` (refuses, ignores, misreads) with ``what``, and why."""

    does: str
    what: str
    why: str


@dataclass(frozen=True)
class ProgramCheck:
    """What a program does with an adapter other than what was meant; nothing if it reads it."""

    folder: Path
    program: str
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """The findings as ``--json`` prints them."""
        found = [asdict(finding) for finding in self.findings]
        return {"adapter": str(self.folder), "for": self.program, "findings": found}

    def __str__(self) -> str:
        if not self.findings:
            return f"{self.program} reads '{self.folder}' as it is meant, as far as is known"
        lines = (f"  {each.does} {each.what}: {each.why}" for each in self.findings)
        return "\n".join([f"{self.program}, given '{self.folder}':", *lines])


@cache
def programs() -> dict[str, Any]:
    """The table of programs, read once."""
    table = Path(__file__).with_name("programs.yaml")
    found: dict[str, Any] = yaml.safe_load(table.read_text(encoding="utf-8"))
    return found


@checked
def check_for(adapter: str | Path, program: str, base: str | Path | None = None) -> ProgramCheck:
    """Tell what ``program`` would do with an adapter's directory of peft's format.

    ``base`` is the directory of the base, which is asked for the adapter's modules. Raises
    SurgeryError: PSG501 and PSG505 for an adapter that cannot be read at all, PSG207 for such a
    base, PSG904 for a program that is not known.
    """
    if program not in programs():
        hint = did_you_mean(program, programs())
        raise SurgeryError("PSG904", f"what '{program}' does is not known", hint)
    folder, row = Path(adapter), programs()[program]
    config = read_lora_config(folder)
    file = read_header(folder / TENSORS, "PSG505")
    findings = [*_of_keys(config, row), *_of_tensors(file, row)]
    if base is not None:
        findings += _of_modules(Path(base), file, row["module"])
    return ProgramCheck(folder, program, tuple(findings))


def _of_keys(config: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[Finding]:
    for key, entry in row["keys"].items():
        value = config.get(key)
        if not any(value is usual or value == usual for usual in entry["values"]):
            yield Finding(entry["does"], f"{key} = {value!r:.60} in {CONFIG}", entry["why"])
    ranks, rank = row.get("ranks"), config.get("r")
    if ranks and isinstance(rank, int) and rank > max(ranks):
        yield Finding("refuses", f"r = {rank}", f"it serves ranks up to {max(ranks)}")


def _of_tensors(file: TensorFile, row: Mapping[str, Any]) -> Iterator[Finding]:
    """Tensors of each kind that is treated otherwise, told once; and halves of pairs."""
    for ending, entry in row["tensors"].items():
        names = sorted(name for name in file.tensors if name.endswith(ending))
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            yield Finding(entry["does"], f"the tensor '{names[0]}'{more}", entry["why"])
    for name in sorted(file.tensors):
        for one, other in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
            twin = name.replace(one, other)
            if one in name and twin not in file.tensors:
                yield Finding("misreads", f"the tensor '{name}'", f"it has no '{other}' beside it")


def _of_modules(base: Path, file: TensorFile, entry: Mapping[str, str]) -> Iterator[Finding]:
    """Adapted modules that a base has no weight of."""
    held = read_model_files(base).tensors
    modules = sorted({name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in file.tensors})
    for module in filter(None, modules):
        weight = f"{module}.weight"
        if not any(weight == name or weight.endswith(f".{name}") for name in held):
            near = did_you_mean(weight, held)
            yield Finding(entry["does"], f"the adapter of '{module}'", f"{entry['why']}; {near}")
