"""What README shows runs, and prints what it says."""

import re
from pathlib import Path

import pytest

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
