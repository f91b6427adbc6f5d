"""What README shows runs, and prints what it says."""

import re
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peftsurgery as ps
from tests.surgery.model.processes import run_to_end

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(README) if kind == language]


@pytest.mark.slow
def test_the_snippets_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for text in blocks("yaml"):
        name = re.match(r"# (\S+\.yaml)", text)
        assert name is not None
        Path(name[1]).write_text(text, encoding="utf-8")
    scope: dict[str, object] = {"__name__": "readme"}
    for text in blocks("python"):
        exec(compile(text, "README.md", "exec"), scope)
    printed = capsys.readouterr().out
    shown = [text for text in blocks("") if text.startswith("PSG")]
    assert len(shown) == 1
    assert shown[0] in printed
    assert "lora_qv: 4 sites" in printed
    assert (tmp_path / "surgery" / "adapter.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("text", blocks("py"), ids=["sharded", "launched"])
def test_the_scripts_run_as_their_first_line_says(text: str, tmp_path: Path) -> None:
    name, _, command = text.splitlines()[0].removeprefix("# ").partition(": ")
    (tmp_path / name).write_text(text, encoding="utf-8")
    run_to_end(installed(*command.split()), tmp_path)
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128}
    config = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)
    trained = ps.load(tmp_path / name.removesuffix(".py"), ps.capture(LlamaForCausalLM(config)))
    assert all(value.abs().max() > 0 for value in trained.learnt().values())


def installed(command: str, *arguments: str) -> list[str]:
    """A command of an installed package, run by this Python, on whose PATH it need not be."""
    entry = next(e for e in entry_points(group="console_scripts") if e.name == command)
    start = (
        f"import sys, {entry.module}; sys.argv[0] = {command!r}; {entry.value.replace(':', '.')}()"
    )
    return [sys.executable, "-c", start, *arguments]
