"""Whatever the files of a fold hold: read, or refused by code, with nothing left half-written.

Bounded by the number of examples; each is a right file with a few changes (tests/mutations.py).
"""

import json
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftsurgery.checkpoint.certificate import verify
from peftsurgery.checkpoint.plan import Planned
from peftsurgery.checkpoint.program_check import check_for
from peftsurgery.checkpoint.streaming import fold_files
from peftsurgery.checkpoint.unfolding import unfold_checkpoint
from peftsurgery.formats.peft.named_plan import named_plan
from peftsurgery.model_files import read_model_files
from peftsurgery.tensor_file import header_of, laid_out, read_header
from tests.checkpoint import streamed
from tests.mutations import changed_file, changed_header, ended, with_change

HERE = settings(max_examples=100, suppress_health_check=list(HealthCheck))
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a peft adapter for it and a fold of the two, with residuals."""
    place = tmp_path_factory.mktemp("fuzz")
    base, adapter = streamed.made_at(place, 2, 6, 8)
    planned = Planned(streamed.plan_of(2), base, read_header(adapter))
    fold_files(planned, place / "out", reversible=True)
    lora = place / "lora"
    lora.mkdir()
    shapes = {"A": (2, 8), "B": (6, 2)}
    tensors = laid_out(
        (f"{PREFIX}layers.{number}.q.lora_{name}.weight", "F32", shape)
        for number in range(2)
        for name, shape in shapes.items()
    )
    header = header_of(tensors, {"format": "pt"})
    (lora / "adapter_model.safetensors").write_bytes(header + bytes(tensors[-1].end))
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "bias": "none"}
    about = {"base_model_name_or_path": str(base), "rank_pattern": {}, "fan_in_fan_out": False}
    (lora / "adapter_config.json").write_text(json.dumps(config | about))
    return place


def test_the_folder_is_right_before_it_is_changed(folder: Path) -> None:
    assert verify(folder / "out").changed == 2
    planned = named_plan(folder / "lora", str(folder / "base"))
    assert planned is not None
    assert len(planned.plan.sites) == 2


@pytest.mark.slow
@HERE
@given(data=st.data())
def test_headers_describe_what_is_there_or_are_refused(folder: Path, data: st.DataObject) -> None:
    file = folder / "base" / "model-00000.safetensors"
    content = data.draw(changed_header(file.read_bytes()))
    with with_change(folder / "base", file, content) as again:
        code = ended(lambda: read_header(again / file.name))
        assert code in ("", "PSG207")
        if not code:
            found = read_header(again / file.name)
            size = sum(tensor.size for tensor in found.tensors.values())
            assert found.offset + size == len(content)
        assert ended(lambda: read_model_files(again)) in ("", "PSG207")


@HERE
@given(data=st.data())
def test_certificates_are_believed_or_refused(folder: Path, data: st.DataObject) -> None:
    files = sorted((folder / "out").iterdir())
    told = next(file for file in files if file.name == "peftsurgery.json")
    file, content = data.draw(
        st.sampled_from([told] * 3 + [f for f in files if f.suffix != ".residual"]).flatmap(
            changed_file
        )
    )
    with with_change(folder / "out", file, content) as again:
        assert ended(lambda: verify(again)) in ("", "PSG207", "PSG417", "PSG609")
        code = ended(lambda: unfold_checkpoint(again, again.parent / "back"))
        assert code in ("", "PSG207", "PSG417", "PSG418", "PSG602", "PSG603", "PSG609")
        assert (again.parent / "back").exists() is not bool(code)
        assert not list(again.parent.glob("*.part"))


@HERE
@given(data=st.data())
def test_adapters_are_planned_by_names_or_refused(folder: Path, data: st.DataObject) -> None:
    files = sorted((folder / "lora").iterdir())
    file, content = data.draw(st.sampled_from(files).flatmap(changed_file))
    with with_change(folder / "lora", file, content) as again:
        code = ended(lambda: named_plan(again, str(folder / "base")))
        assert code[:5] in ("", "PSG50")
        for program in ("vllm", "peft"):
            assert ended(partial(check_for, again, program))[:5] in ("", "PSG50")
