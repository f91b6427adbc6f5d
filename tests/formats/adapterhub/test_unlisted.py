"""AdapterHub's adapters for architectures that the table of the library's names does not list.

The golden adapters again, with the table empty: what their tensors' names tell is read and computes
what the library computed; what they do not tell is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import peftsurgery as ps
from peftsurgery.formats.adapterhub import library
from peftsurgery.formats.words import words_of
from tests.formats.adapterhub.test_directory import cases, logits, tensors_in
from tests.formats.golden import GOLDEN, captured, expected

TENSORS, CONFIG = "adapter.safetensors", "adapter_config.json"


@pytest.fixture(autouse=True)
def _nothing_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    table = words_of(Path(library.__file__).with_name("library.yaml"))
    monkeypatch.setitem(table, "layouts", {})


# Of modules with weights of their own and in place, and of fused ones; new modules elsewhere.
FEW = {("gpt2", "lora_all"), ("gpt2", "ia3"), ("gpt2", "double_seq_bn"), ("gpt2", "prefix_mlp")}
FEW |= {("gpt2", "fusion"), ("llama", "lora_all"), ("llama", "double_seq_bn"), ("roberta", "mam")}


@pytest.mark.parametrize(
    ("name", "method"),
    [case for case in cases() if case.values[0] == "bert" or tuple(case.values) in FEW],
)
def test_an_adapter_computes_what_the_library_computed(name: str, method: str) -> None:
    operated = ps.from_adapterhub(captured(name), GOLDEN / name / method)
    assert (logits(operated, name) - expected(name)[method]).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("method", "part"),
    [
        ("seq_bn", "ffn"),
        ("double_seq_bn", "attention"),
        ("lora_all", "intermediate"),
        ("unipelt", "prefix"),
    ],
)
def test_what_has_no_name_is_not_written(method: str, part: str, tmp_path: Path) -> None:
    operated = ps.from_adapterhub(captured("bert"), GOLDEN / "bert" / method)
    with pytest.raises(ps.SurgeryError) as caught:
        ps.to_adapterhub(operated, tmp_path / "out")
    assert caught.value.code == "PSG513"
    assert f"name for the {part} of a layer of a 'bert'" in caught.value.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["lora", "prefix_flat"])
def test_what_needs_no_name_comes_out_as_it_went_in(method: str, tmp_path: Path) -> None:
    source = GOLDEN / "gpt2" / method
    ps.to_adapterhub(ps.from_adapterhub(captured("gpt2"), source), tmp_path / "out")
    made, given = tensors_in(tmp_path / "out"), tensors_in(source)
    assert made.keys() == given.keys()
    for file, tensors in given.items():
        assert made[file].keys() == tensors.keys()
        assert all((made[file][key] == value).all() for key, value in tensors.items())


def copied(
    method: str, folder: Path, renamed: Mapping[str, str] | None = None, **changes: Any
) -> Path:
    """A golden adapter with parts of its tensors' names and keys of its config changed."""
    shutil.copytree(GOLDEN / "bert" / method, folder)
    tensors = load_file(folder / TENSORS)
    for old, new in (renamed or {}).items():
        tensors = {key.replace(old, new): value for key, value in tensors.items()}
    save_file(tensors, folder / TENSORS)
    values = json.loads((folder / CONFIG).read_text())
    values["config"] |= changes
    (folder / CONFIG).write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("method", "renamed", "changes", "code", "text"),
    [
        ("seq_bn", {".output.adapters.": ".aside.adapters."}, {}, "PSG513", "beneath 'aside'"),
        ("seq_bn", {}, {"mh_adapter": True}, "PSG513", "for the attention of a layer"),
        ("seq_bn", {"layer.1.output": "layer.1.mlp"}, {}, "PSG513", "'mlp' and 'output'"),
        ("seq_bn", {"layer.1.output": "tail.output"}, {}, "PSG507", "layer.1.output"),
        ("lora", {}, {"output_lora": True}, "PSG513", "for the output of a layer"),
        ("lora", {"self.value": "self.worth"}, {}, "PSG507", "self.value"),
        ("lora_all", {}, {"output_lora": False}, "PSG506", "has no place"),
    ],
)
def test_what_the_names_do_not_tell_is_refused(
    method: str,
    renamed: dict[str, str],
    changes: dict[str, Any],
    code: str,
    text: str,
    tmp_path: Path,
) -> None:
    folder = copied(method, tmp_path / "adapter", renamed, **changes)
    with pytest.raises(ps.SurgeryError) as caught:
        ps.from_adapterhub(captured("bert"), folder)
    assert (caught.value.code, text in caught.value.message) == (code, True), caught.value


@pytest.mark.parametrize("holder", ["output_adapters", "ffn", "mlp.dense"])
def test_a_holder_is_known_by_its_words(holder: str, tmp_path: Path) -> None:
    renamed = {".output.adapters.": f".{holder}.adapters."}
    operated = ps.from_adapterhub(captured("bert"), copied("seq_bn", tmp_path / "adapter", renamed))
    assert (logits(operated, "bert") - expected("bert")["seq_bn"]).abs().max() <= 1e-5
