"""Whatever the files of an adapter or a surgery hold: read onto a model, or refused by code.

Bounded by the number of examples; each is a right file with a few changes (tests/mutations.py).
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

import peftsurgery as ps
from peftsurgery.surgery.model.saved.contents import contents_of
from tests.formats.golden import GOLDEN
from tests.formats.golden import captured as bert
from tests.formats.peft.test_refusals import Small, captured
from tests.mutations import changed_file, ended, with_change

HERE = settings(max_examples=60, suppress_health_check=list(HealthCheck))
READ_BY_JSON = {".json", ".safetensors"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A peft adapter and a surgery on one small model."""
    folder = tmp_path_factory.mktemp("fuzz")
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["first", "second"])
    get_peft_model(Small(), config).save_pretrained(folder / "peft")
    ps.apply(captured(), "lora_all_linear", rank=2).save(folder / "surgery")
    return folder


def changes(folder: Path) -> st.SearchStrategy[tuple[Path, bytes]]:
    """One of a folder's files, changed."""
    files = sorted(each for each in folder.iterdir() if each.suffix in READ_BY_JSON)
    return st.sampled_from(files).flatmap(changed_file)


def codes(folder: Path, data: st.DataObject, *readers: Callable[[Path], object]) -> Iterator[str]:
    """What each reader says of a folder in which a file was changed."""
    file, content = data.draw(changes(folder))
    with with_change(folder, file, content) as again:
        for reader in readers:
            yield ended(partial(reader, again))


@HERE
@given(data=st.data())
def test_adapters_of_peft_are_read_or_refused(saved: Path, data: st.DataObject) -> None:
    (code,) = codes(saved / "peft", data, lambda folder: ps.from_peft(captured(), folder))
    assert code == "" or code.startswith(("PSG5", "PSG3", "PSG1"))


@HERE
@given(data=st.data())
def test_adapters_of_adapterhub_are_read_or_refused(data: st.DataObject) -> None:
    folder = GOLDEN / "bert" / "lora"
    (code,) = codes(folder, data, lambda where: ps.from_adapterhub(bert("bert"), where))
    assert code == "" or code.startswith(("PSG5", "PSG3", "PSG1"))


@HERE
@given(data=st.data())
def test_surgeries_are_opened_and_described_or_refused(saved: Path, data: st.DataObject) -> None:
    opened, described = codes(
        saved / "surgery", data, lambda where: ps.load(where, captured()), contents_of
    )
    assert opened == "" or opened.startswith(("PSG6", "PSG3", "PSG1"))
    assert described == "" or described.startswith(("PSG6", "PSG1"))
    torch.manual_seed(0)
