"""Output is there whole or not at all, and inputs are never touched."""

from pathlib import Path

import pytest

from peftsurgery.errors import SurgeryError
from peftsurgery.outputs import fresh


def write(folder: Path, text: str = "new") -> None:
    folder.mkdir()
    (folder / "config.json").write_text(text)


def fail_after_writing(out: Path, error: type[BaseException]) -> None:
    with fresh(out, force=True) as part:
        write(part)
        raise error


def test_the_output_takes_its_name_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with fresh(out) as part:
        write(part)
        assert not out.exists()
    assert (out / "config.json").read_text() == "new"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_of_a_failure(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        fail_after_writing(tmp_path / "out", error)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_and_untouched(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    with pytest.raises(SurgeryError, match="PSG601"), fresh(out):
        pass
    assert (out / "config.json").read_text() == "old"


def test_force_replaces_a_model_directory(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    with fresh(out, force=True) as part:
        write(part)
    assert (out / "config.json").read_text() == "new"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_setup.json", "surgery.json"])
def test_force_replaces_whatever_a_command_wrote(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).touch()
    with fresh(out, force=True) as part:
        write(part)
    assert (out / "config.json").read_text() == "new"
    assert not (out / name).exists()


def test_force_keeps_the_old_output_when_the_new_one_fails(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    with pytest.raises(ValueError):
        fail_after_writing(out, ValueError)
    assert (out / "config.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_force_does_not_replace_a_directory_that_is_no_model(tmp_path: Path) -> None:
    out = tmp_path / "home"
    out.mkdir()
    (out / "letters.txt").write_text("dear")
    with pytest.raises(SurgeryError, match="PSG601"), fresh(out, force=True):
        pass
    assert (out / "letters.txt").read_text() == "dear"


def test_force_does_not_write_through_a_link(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "old")
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SurgeryError, match="PSG601"), fresh(tmp_path / "out", force=True):
        pass
    assert (tmp_path / "elsewhere" / "config.json").read_text() == "old"


@pytest.mark.parametrize("place", ["model", "model/inside", "link", "link/inside", "."])
def test_an_output_that_is_holds_or_lies_in_the_input_is_refused(
    tmp_path: Path, place: str
) -> None:
    model = tmp_path / "model"
    write(model, "old")
    (tmp_path / "link").symlink_to(model)
    with pytest.raises(SurgeryError, match="PSG602"), fresh(tmp_path / place, [model], force=True):
        pass
    assert (model / "config.json").read_text() == "old"


def test_an_output_without_a_parent_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="PSG603"), fresh(tmp_path / "no" / "out"):
        pass


def test_a_hub_id_is_no_directory_to_keep_apart_from(tmp_path: Path) -> None:
    with fresh(tmp_path / "out", ["owner/name"]) as part:
        write(part)
    assert (tmp_path / "out" / "config.json").is_file()
