"""No place that is read is written, however either of the two is spelt or linked."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from peftsurgery.errors import SurgeryError
from peftsurgery.places import check_apart, everything_read, hub_folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's directory: its weights lie in a store elsewhere, as in the hub's cache."""
    folder, store = tmp_path / "model", tmp_path / "store"
    (folder / "part").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    store.mkdir()
    (store / "blob").write_text("weights")
    (folder / "model.safetensors").symlink_to(store / "blob")
    (store / "vocabulary").mkdir()
    (folder / "tokenizer").symlink_to(store / "vocabulary")
    (folder / "loop").symlink_to(folder)
    (folder / "lost").symlink_to(folder / "nowhere")
    return folder


def linked(tmp_path: Path, to: Path) -> Path:
    (tmp_path / "link").symlink_to(to)
    return tmp_path / "link"


def hard_linked(tmp_path: Path, to: Path) -> Path:
    (tmp_path / "copy").mkdir()
    os.link(to.resolve(), tmp_path / "copy" / "old.bin")
    return tmp_path / "copy"


def opened(folder: Path) -> str:
    """A directory by the number of an open file, which stays open until the process ends."""
    return f"/proc/self/fd/{os.open(folder, os.O_RDONLY)}"


TOUCHING: dict[str, Callable[[Path, Path], str | Path]] = {
    "itself": lambda tmp, m: m,
    "with a slash": lambda tmp, m: f"{m}/",
    "inside": lambda tmp, m: m / "new",
    "deep inside, of what is not there": lambda tmp, m: m / "a" / "b" / "c",
    "a file of it": lambda tmp, m: m / "config.json",
    "its parent": lambda tmp, m: tmp,
    "by two dots": lambda tmp, m: m / "part" / ".." / "new",
    "by two dots from beside": lambda tmp, m: tmp / "store" / ".." / "model" / "new",
    "two dots at the end": lambda tmp, m: m / "part" / "..",
    "relative": lambda tmp, m: os.path.relpath(m / "new"),
    "a link": lambda tmp, m: linked(tmp, m),
    "through a link": lambda tmp, m: linked(tmp, m) / "new",
    "a link to inside": lambda tmp, m: linked(tmp, m / "part"),
    "a link to what is not there": lambda tmp, m: linked(tmp, m / "new"),
    "two dots behind a link": lambda tmp, m: linked(tmp, m / "part") / ".." / "new",
    "through itself": lambda tmp, m: m / "loop" / "loop" / "new",
    "where its weights lie": lambda tmp, m: tmp / "store" / "blob",
    "what holds its weights": lambda tmp, m: tmp / "store",
    "inside a directory that it links": lambda tmp, m: tmp / "store" / "vocabulary" / "new",
    "an open file's number": lambda tmp, m: f"{opened(m)}/new",
    "the process's directory": lambda tmp, m: f"/proc/self/cwd/{os.path.relpath(m / 'new')}",
    "the process's root": lambda tmp, m: f"/proc/self/root{m}/new",
    "a hard link of a file": lambda tmp, m: hard_linked(tmp, m / "config.json") / "old.bin",
    "what holds a hard link": lambda tmp, m: hard_linked(tmp, m / "model.safetensors"),
}


@pytest.mark.parametrize("how", TOUCHING)
def test_what_is_read_is_never_written(how: str, tmp_path: Path, model: Path) -> None:
    with pytest.raises(SurgeryError, match="PSG602"):
        check_apart(TOUCHING[how](tmp_path, model), [model])


APART: dict[str, Callable[[Path, Path], str | Path]] = {
    "beside": lambda tmp, m: tmp / "new",
    "a longer name": lambda tmp, m: tmp / "model-2",
    "out of it by two dots": lambda tmp, m: m / ".." / "new",
    "a link to elsewhere": lambda tmp, m: linked(tmp, tmp / "store" / "other"),
}


@pytest.mark.parametrize("how", APART)
def test_what_is_beside_may_be_written(how: str, tmp_path: Path, model: Path) -> None:
    target = APART[how](tmp_path, model)
    check_apart(target, [model, "owner/name", "lora_qv", None, ""])
    with pytest.raises(SurgeryError, match="PSG602"):
        check_apart(target, [tmp_path])  # which it does lie in


def test_what_is_read_may_be_known_by_a_link(tmp_path: Path, model: Path) -> None:
    link = linked(tmp_path, model)
    for target in (model, model / "new", link, link / "new"):
        with pytest.raises(SurgeryError, match="PSG602"):
            check_apart(target, [link])
        with pytest.raises(SurgeryError, match="PSG602"):
            check_apart(target, [f"{link}/../link/part/.."])


def test_a_bad_path_is_refused(model: Path) -> None:
    with pytest.raises(SurgeryError, match="PSG603"):
        check_apart("a\0b", [model])


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("surgery.json", "base"),
        ("adapter_config.json", "base_model_name_or_path"),
        ("adapter_config.json", "model_name"),
    ],
)
def test_what_an_adapter_was_made_for_is_read_too(
    file: str, key: str, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, second = tmp_path / "adapter", tmp_path / "second"
    for folder, base in ((adapter, second), (second, model)):
        folder.mkdir()
        (folder / file).write_text(json.dumps({key: str(base)}))
    assert everything_read([adapter]) == [adapter, second, model]
    for target in (model, second, model / "new"):
        with pytest.raises(SurgeryError, match="PSG602"):
            check_apart(target, [adapter])
    cache = tmp_path / "cache"
    (cache / "models--owner--name" / "snapshots" / "1").mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    (adapter / file).write_text(json.dumps({key: "owner/name"}))
    for target in (cache, cache / "models--owner--name" / "snapshots" / "1" / "new"):
        with pytest.raises(SurgeryError, match="PSG602"):
            check_apart(target, [adapter])


def test_a_damaged_adapter_is_a_place_all_the_same(tmp_path: Path) -> None:
    for content in ("{", "[]", '{"base": 3}', '{"base": null}'):
        (tmp_path / "surgery.json").write_text(content)
        assert everything_read([tmp_path]) == [tmp_path]


@pytest.mark.parametrize("name", ["", "\0", " ", ".", "-a", "a" * 97, "a//b", "é"])
def test_what_no_id_of_the_hub_looks_like_is_no_place(name: str) -> None:
    assert hub_folder(name) is None
