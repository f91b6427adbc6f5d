"""Saved surgeries: what was learnt comes back, and nothing that is damaged or foreign is taken."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftsurgery as ps
from peftsurgery import files
from peftsurgery.surgery.model.operated import OperatedModel
from tests.models.captured import captured
from tests.models.zoo import ZOO
from tests.surgery.reference import randomise


@pytest.fixture
def operated() -> OperatedModel:
    first = ps.apply(captured("bert"), "lora_qv", rank=3, alpha=9)
    rule = ps.Rule(
        match="parameter", where={"kind": "bias", "path": r"classifier\.bias"}, train=True
    )
    return randomise(ps.apply(first, rule, name="head"))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**ZOO["bert"].inputs(2, 6)).logits


def test_a_saved_surgery_reloads_exactly(operated: OperatedModel, tmp_path: Path) -> None:
    operated.save(tmp_path / "op")
    again = ps.load(tmp_path / "op", base=captured("bert"))
    assert torch.equal(logits(again), logits(operated))
    assert [op.settings for op in again.operations] == [op.settings for op in operated.operations]
    assert {n for n, p in again.named_parameters() if p.requires_grad} == set(operated.learnt())


def test_only_what_was_learnt_is_saved_and_nothing_is_pickled(
    operated: OperatedModel, tmp_path: Path
) -> None:
    operated.save(tmp_path / "op")
    files = sorted(str(p.relative_to(tmp_path / "op")) for p in (tmp_path / "op").rglob("*.*"))
    rules = ["rules/0_lora_qv.yaml", "rules/1_custom.yaml"]
    assert files == ["adapter.safetensors", *rules, "surgery.json"]
    assert set(load_file(tmp_path / "op/adapter.safetensors")) == set(operated.learnt())


def test_saving_again_replaces_a_surgery_but_nothing_else(
    operated: OperatedModel, tmp_path: Path
) -> None:
    operated.save(tmp_path / "op")
    randomise(operated, seed=9).save(tmp_path / "op")
    assert torch.equal(logits(ps.load(tmp_path / "op", captured("bert"))), logits(operated))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    with pytest.raises(ps.SurgeryError, match="PSG604"):
        operated.save(tmp_path / "mine")


def test_a_surgery_on_a_directory_finds_its_base_again(tmp_path: Path) -> None:
    ZOO["bert"].build().save_pretrained(tmp_path / "bert")
    operated = ps.apply(ps.capture(str(tmp_path / "bert")), "lora_qv")
    assert all(p.is_meta for n, p in operated.named_parameters() if "lora_qv" not in n)
    assert not any(value.is_meta for value in operated.learnt().values())
    randomise(operated).save(tmp_path / "op")
    again = ps.load(tmp_path / "op")
    assert torch.equal(logits(again), logits(operated))
    assert not torch.equal(logits(again), logits(ZOO["bert"].build()))


TRAINED_OF_THE_BASE: dict[str, dict[str, list[str]]] = {
    "lora_qv": {"train": ["classifier"]},
    "bitfit": {},
    "p_tuning_v2": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("rule", TRAINED_OF_THE_BASE)
def test_what_is_trained_of_a_base_in_a_directory_comes_back(rule: str, tmp_path: Path) -> None:
    ZOO["bert"].build().save_pretrained(tmp_path / "base")

    def fresh() -> OperatedModel:
        graph = ps.capture(str(tmp_path / "base"))
        return ps.apply(graph, rule, **TRAINED_OF_THE_BASE[rule]).eval()

    untouched = fresh()
    untouched.save(tmp_path / "untouched")  # before the base was read for anything else
    trained = randomise(fresh(), scale=0.3)
    expected = logits(trained)
    assert (logits(untouched) - expected).abs().max() > 0.1
    trained.save(tmp_path / "op")
    assert torch.equal(logits(ps.load(tmp_path / "op").eval()), expected)
    assert torch.equal(
        logits(ps.apply(ps.load(tmp_path / "op"), "ia3", name="more").eval()), expected
    )
    assert torch.equal(logits(ps.load(tmp_path / "untouched").eval()), logits(untouched))
    given = fresh()
    given.load_state_dict(trained.state_dict())
    assert torch.equal(logits(given), expected)
    base, state = load_file(tmp_path / "base/model.safetensors"), fresh().state_dict()
    assert all(torch.equal(state[name], base[name]) for name in base.keys() & state.keys())
    assert base.keys() & state.keys()


def test_running_statistics_that_training_moved_come_back(tmp_path: Path) -> None:
    graph, images = captured("resnet"), ZOO["resnet"].inputs(3, 6)
    trained = ps.apply(graph, "lora_conv").train()
    for _ in range(2):
        trained(**images)
    trained.eval().save(tmp_path / "op")
    again = ps.load(tmp_path / "op", base=graph).eval()
    with torch.no_grad():
        expected = trained(**images)[0]
        assert torch.equal(again(**images)[0], expected)
        assert not torch.equal(ps.apply(graph, "lora_conv").eval()(**images)[0], expected)
        torch.testing.assert_close(ps.fold(again)(**images)[0], expected, rtol=0, atol=1e-5)
    fresh = ps.apply(graph, "lora_conv")
    fresh.save(tmp_path / "fresh")
    assert set(load_file(tmp_path / "fresh/adapter.safetensors")) == set(fresh.learnt())


class Marked(nn.Module):
    """Training marks in a buffer what it has seen."""

    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(4, dtype=torch.bool))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y * self.seen


def test_marks_that_training_made_come_back(tmp_path: Path) -> None:
    graph = ps.capture(Marked(), (torch.randn(2, 4),))
    operated = ps.apply(graph, "lora_all_linear", rank=2)
    operated.seen[1] = True
    operated.save(tmp_path)
    assert ps.load(tmp_path, graph).seen.tolist() == [False, True, False, False]
    tensors = load_file(tmp_path / "adapter.safetensors")
    save_file({**tensors, "seen": torch.randn(4)}, tmp_path / "adapter.safetensors")
    with pytest.raises(ps.SurgeryError, match="PSG606"):
        ps.load(tmp_path, graph)


def test_a_surgery_goes_on_another_that_was_saved(operated: OperatedModel, tmp_path: Path) -> None:
    captured("bert").source.module.save_pretrained(tmp_path / "base")
    first = randomise(ps.apply(ps.capture(str(tmp_path / "base")), "ia3"))
    first.save(tmp_path / "first")
    randomise(ps.apply(captured("bert"), "lora_qv")).save(tmp_path / "second")
    both = ps.load(tmp_path / "second", base=str(tmp_path / "first"))
    assert both.adapters == ("ia3", "lora_qv")


class Phases(nn.Module):
    """A parameter of complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.randn(4, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.phase.abs()


def test_complex_parameters_of_the_base_come_back(tmp_path: Path) -> None:
    graph = ps.capture(Phases(), (torch.randn(2, 4),))
    operated = ps.apply(graph, ps.Rule(match="parameter", where={"path": "phase"}, train=True))
    with torch.no_grad():
        operated.phase.mul_(2j)
    operated.save(tmp_path)
    assert torch.equal(ps.load(tmp_path, graph).phase, operated.phase)


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "adapter.safetensors")
    tensors.popitem()
    save_file(tensors, folder / "adapter.safetensors")


def add_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "adapter.safetensors")
    save_file({**tensors, "extra": torch.ones(1)}, folder / "adapter.safetensors")


def reshape_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "adapter.safetensors")
    name = next(name for name in tensors if name.endswith(".A"))
    save_file({**tensors, name: torch.ones(5, 32)}, folder / "adapter.safetensors")


def poison(folder: Path) -> None:
    tensors = load_file(folder / "adapter.safetensors")
    next(iter(tensors.values())).view(-1)[0] = float("inf")
    save_file(tensors, folder / "adapter.safetensors")


def truncate(folder: Path) -> None:
    data = (folder / "adapter.safetensors").read_bytes()
    (folder / "adapter.safetensors").write_bytes(data[: len(data) // 2])


def cast(dtype: torch.dtype) -> Callable[[Path], None]:
    """One of the tensors in another dtype, in the shape it had."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / "adapter.safetensors")
        name = next(name for name in tensors if name.endswith(".A"))
        save_file({**tensors, name: tensors[name].to(dtype)}, folder / "adapter.safetensors")

    return damage


def text(content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "surgery.json").write_text(content) and None


def manifest(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "surgery.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def operation(**changes: Any) -> Callable[[Path], None]:
    """The first operation with other values in the manifest."""

    def damage(folder: Path) -> None:
        entries = json.loads((folder / "surgery.json").read_text())["operations"]
        manifest(operations=[entries[0] | changes, *entries[1:]])(folder)

    return damage


def instead(name: str, place: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else where a file of the surgery was."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        place(folder / name)

    return damage


# Opening the first would wait for ever, and reading the last.
NOT_REGULAR: dict[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "directory": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "nothing": lambda path: None,
}
FILES = {
    "adapter.safetensors": "PSG606",
    "surgery.json": "PSG605",
    "rules/0_lora_qv.yaml": "PSG107",
}


@pytest.mark.parametrize("kind", NOT_REGULAR)
@pytest.mark.parametrize("file", FILES)
def test_only_regular_files_are_read(
    operated: OperatedModel, tmp_path: Path, file: str, kind: str
) -> None:
    operated.save(tmp_path)
    instead(file, NOT_REGULAR[kind])(tmp_path)
    with pytest.raises(ps.SurgeryError, match=f"{FILES[file]}: .*{file}"):
        ps.load(tmp_path, base=captured("bert"))


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (drop_a_tensor, "PSG311"),
        (add_a_tensor, "PSG311"),
        (reshape_a_tensor, "PSG308"),
        (poison, "PSG606"),
        (truncate, "PSG606"),
        (cast(torch.float8_e4m3fn), "PSG606"),
        (cast(torch.complex64), "PSG606"),
        (cast(torch.int32), "PSG606"),
        (cast(torch.bool), "PSG606"),
        (text("{"), "PSG605"),
        (text("[]"), "PSG605"),
        (text('{"format": 1}'), "PSG605"),
        (text("[" * 100_000), "PSG605"),
        (text('{"format": 1, "operations": [], "format": 1}'), "PSG605"),
        (text('{"format": 1, "operations": [], "base": NaN}'), "PSG605"),
        (text(" " * (16 * 2**20 + 1)), "PSG605"),
        (manifest(format=True), "PSG605"),
        (manifest(format=2), "PSG605"),
        (manifest(base=3), "PSG605"),
        (manifest(base=["bert"]), "PSG605"),
        (manifest(active="lora_qv"), "PSG605"),
        (manifest(active=[["lora_qv"]]), "PSG605"),
        (manifest(active=["other"]), "PSG605"),
        (manifest(left_out=[0]), "PSG605"),
        (manifest(left_out={"lora_qv": 0}), "PSG605"),
        (manifest(left_out={"lora_qv": [[0]]}), "PSG605"),
        (manifest(left_out={"other": [0]}), "PSG605"),
        (manifest(left_out={"lora_qv": ["x"]}), "PSG106"),
        (manifest(operations={}), "PSG605"),
        (manifest(operations=[["lora_qv"]]), "PSG605"),
        (operation(name=3), "PSG605"),
        (operation(lost="x"), "PSG605"),
        (operation(lost=-1), "PSG605"),
        (operation(name="a.b"), "PSG605"),
        (operation(settings=[["rank", 3]]), "PSG605"),
        (operation(settings={"rank": [3]}), "PSG121"),
        (operation(rules=3), "PSG605"),
        (operation(rules="../../etc/passwd"), "PSG605"),
        (operation(rules="/etc/passwd"), "PSG605"),
        (operation(rules="rules/\0"), "PSG107"),
    ],
)
def test_damage_is_named(
    operated: OperatedModel, tmp_path: Path, damage: Callable[[Path], None], code: str
) -> None:
    operated.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ps.SurgeryError) as caught:
        ps.load(tmp_path, base=captured("bert"))
    assert caught.value.code == code


def test_fewer_adapters_over_an_old_surgery_leave_nothing_of_it(
    operated: OperatedModel, tmp_path: Path
) -> None:
    operated.save(tmp_path)
    (tmp_path / "rules/notes.yaml").write_text("mine: true")
    operated.save(tmp_path, names="head")
    found = sorted(file.name for file in (tmp_path / "rules").iterdir())
    assert found == ["0_custom.yaml", "notes.yaml"]
    again = ps.load(tmp_path, base=captured("bert"))
    assert again.adapters == ("head",)
    assert set(again.learnt()) == set(operated.learnt("head"))


@pytest.mark.parametrize("names", [[], (), "", "law", ["lora_qv", "law"], [3], [["head"]]])
def test_names_that_are_none_or_unknown_are_not_saved(
    operated: OperatedModel, tmp_path: Path, names: Any
) -> None:
    with pytest.raises(ps.SurgeryError, match="PSG310"):
        operated.save(tmp_path / "op", names=names)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "place", ["/proc/zz", "/dev/full/x", "/dev/null/deep/x", "a\0b", "x" * 999]
)
def test_a_place_that_cannot_be_written_is_refused(operated: OperatedModel, place: str) -> None:
    with pytest.raises(ps.SurgeryError, match=r"PSG603: .*cannot be written"):
        operated.save(place)


def test_nothing_is_left_when_writing_fails(
    operated: OperatedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operated.save(tmp_path / "old")
    before = {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}

    def full(part: Path, content: bytes) -> None:
        part.write_bytes(content[:5])
        if "surgery.json" in part.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_write", full)
    for name in ("old", "new/deep"):
        with pytest.raises(ps.SurgeryError, match=r"PSG603: .*No space left"):
            randomise(operated, seed=9).save(tmp_path / name)
    assert {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")} == before


def test_a_surgery_for_another_model_is_refused(operated: OperatedModel, tmp_path: Path) -> None:
    operated.save(tmp_path)
    with pytest.raises(ps.SurgeryError, match="PSG301"):
        ps.load(tmp_path, base=captured("llama"))
