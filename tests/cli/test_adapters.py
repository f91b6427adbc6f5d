"""extract and merge, as a user calls them."""

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.loras import llama, saved_lora


def test_an_adapter_is_extracted_and_merged_with_itself(run: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    folder = saved_lora(tmp_path / "a=b")  # a name that looks like a weight
    llama().save_pretrained(tmp_path / "base")
    model = PeftModel.from_pretrained(llama(), str(folder)).merge_and_unload()
    model.save_pretrained(tmp_path / "tuned")
    outcome = run("extract", tmp_path / "base", tmp_path / "tuned", "-o", tmp_path / "x", "--json")
    assert outcome.code == 0, outcome.out
    assert outcome.json["schema"] == "peftsurgery.extract/1"
    assert {layer["rank"] for layer in outcome.json["layers"].values()} == {3}
    given = (f"{tmp_path / 'x'}=0.5", folder, "--base", tmp_path / "base")
    outcome = run("merge", *given, "-o", tmp_path / "m", "--how", "svd", "--json")
    assert outcome.code == 0, outcome.out
    assert outcome.json["schema"] == "peftsurgery.merge/1"
    assert set(outcome.json["ranks"].values()) == {3}
    outcome = run("merge", *given, "-o", tmp_path / "n")
    assert "rank 6" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "code", "exit_code"),
    [
        (("merge", "nowhere=0.5"), "PSG501", 3),
        (("merge", "nowhere=much"), "PSG901", 2),
        (("merge", "one", "one=2"), "PSG901", 2),
        (("merge", "one=nan"), "PSG317", 2),
        (("extract", "nowhere", "nowhere"), "PSG205", 3),
        (("extract", "one", "two", "--rank", "2", "--energy", "0.5"), "PSG901", 2),
    ],
)
def test_refusals_have_codes_and_leave_nothing(
    run: Any, tmp_path: Path, arguments: tuple[str, ...], code: str, exit_code: int
) -> None:
    outcome = run(*arguments, "-o", tmp_path / "out", "--json")
    assert outcome.json["error"]["code"] == code
    assert list(tmp_path.iterdir()) == []
