"""What both stories are told with: headings, commands that are really run, and a clean process."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
RULE = ROOT / "rules" / "lora_qv.yaml"
console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)


def workspace(name: str) -> Path:
    """An empty directory for what the story writes."""
    path = ROOT / "build" / "demo" / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def step(text: str) -> None:
    """The heading of a step."""
    console.print(f"\n[bold]{text}[/bold]")


def command(*arguments: str | Path) -> None:
    """Run the ``peftsurgery`` command as a reader would, and show it and what it prints."""
    shown = " ".join(str(argument).removeprefix(f"{ROOT}/") for argument in arguments)
    console.print(f"$ peftsurgery {shown}", style="cyan", markup=False, soft_wrap=True)
    done = subprocess.run(
        [sys.executable, "-m", "peftsurgery", *map(str, arguments)],
        text=True,
        stdout=subprocess.PIPE,
        check=True,
    )
    lines = done.stdout.rstrip().splitlines()
    shown_lines = lines if len(lines) <= 16 else [*lines[:15], f"... {len(lines) - 15} more lines"]
    console.print("\n".join(f"  {line}" for line in shown_lines), markup=False, soft_wrap=True)


def run_plain(model: Path, inputs: dict[str, Tensor], generate: int = 0) -> dict[str, Tensor]:
    """What transformers alone makes of ``inputs`` with a model directory, in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "inputs.safetensors"), Path(folder, "outputs.safetensors")
        save_file({name: value.contiguous() for name, value in inputs.items()}, given)
        script = Path(__file__).with_name("plain.py")
        arguments = [model, given, made, "--generate", generate]
        # -I: neither this directory nor PYTHONPATH is on the path of the new process.
        subprocess.run([sys.executable, "-I", script, *map(str, arguments)], check=True)
        return load_file(made)


def compare(what: str, operated: Tensor, folded: Tensor, limit: float) -> None:
    """Show the largest difference, and end the story if it is not below ``limit``."""
    difference = (operated - folded).abs().max().item()
    console.print(
        f"  largest difference of the {what}: [bold]{difference:.1e}[/bold] (limit {limit:.0e})"
    )
    if not difference < limit:
        sys.exit("the folded model is not the operated one")


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that training may change: what the rules added."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
