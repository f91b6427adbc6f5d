"""Folds of what is elsewhere: the bytes of a fold here, through connections that break."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import peftsurgery as ps
from peftsurgery import remote
from peftsurgery.cli.root import root
from peftsurgery.formats.streamed_fold import estimate_fold
from tests.formats.breaking import BreakingFileSystem, BreakingProxy, serving_s3
from tests.formats.stored import adapter_at, base_at, content

CERTIFICATE = "peftsurgery.json"
RULE = """
name: one
with: {rank: 2}
rules:
  - match: linear
    where: {role: ffn.up}
    params:
      A: {shape: [rank, in], init: normal(1)}
      B: {shape: [out, rank], init: normal(1)}
    rewrite: y + linear(linear(x, A), B)
    fold: W + B @ A
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded base, a LoRA for it, and what a fold of them here writes."""
    root = tmp_path_factory.mktemp("here")
    base = base_at(root / "base", "Llama", torch.bfloat16, "10KB", intermediate_size=48)
    adapter = adapter_at(root / "lora", base, target_modules=r".*(q_proj|o_proj|down_proj)")
    ps.fold_checkpoint(adapter, base, root / "out")
    return root


@pytest.fixture(autouse=True)
def elsewhere(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BreakingFileSystem]:
    """The same base and adapter at ``breaking://it``, at first unbroken."""
    monkeypatch.setattr(remote, "PAUSES", [0.0, 0.0])
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    fsspec.register_implementation("breaking", BreakingFileSystem, clobber=True)
    fs = BreakingFileSystem()
    for each in (fs.store, fs.written, fs.read, fs.sending, fs.asking):
        each.clear()
    for name in ("base", "lora"):
        fs.put(f"{here / name}/", f"/it/{name}/", recursive=True)
    for each in (fs.written, fs.read):
        each.clear()
    yield fs
    shards = content(here / "base")
    assert {name: fs.cat_file(f"/it/base/{name}") for name in shards} == shards


def shards_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def taken(url: str, into: Path) -> Path:
    """A directory elsewhere, copied here by fsspec itself."""
    fs, path = fsspec.core.url_to_fs(url)
    for name in fs.find(path):
        target = into / name[len(path) :].lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        fs.get_file(name, str(target))
    return into


def check_same(here: Path, out: Path) -> None:
    """All bytes are those of the fold here, and the certificate but for names and dates."""
    mine, other = content(out), content(here / "out")
    said, wanted = (json.loads(each.pop(CERTIFICATE)) for each in (mine, other))
    assert mine == other
    for each in (said, wanted):
        each["folded"][0]["from"] = each["base"] = each["date"] = None
    assert said == wanted
    assert ps.verify(out).changed


@pytest.mark.parametrize("place", ["memory://m", "breaking://it"])
@pytest.mark.parametrize("which", ["all", "base", "out", "adapter"])
def test_what_is_elsewhere_is_folded_as_what_is_here(
    here: Path, tmp_path: Path, place: str, which: str
) -> None:
    for name in ("base", "lora"):
        fs, path = fsspec.core.url_to_fs(f"{place}/{name}")
        fs.put(f"{here / name}/", f"{path}/", recursive=True)
    base = f"{place}/base" if which in ("all", "base") else here / "base"
    adapter = f"{place}/lora" if which in ("all", "adapter") else here / "lora"
    out = f"{place}/out-{which}" if which in ("all", "out") else tmp_path / "out"
    report = ps.fold_checkpoint(adapter, base, out)
    assert str(report.out) == str(out)
    found = taken(out, tmp_path / "out") if isinstance(out, str) else tmp_path / "out"
    check_same(here, found)
    said = json.loads((found / CERTIFICATE).read_bytes())
    assert (said["base"], said["folded"][0]["from"]) == (str(base), str(adapter))


def test_a_saved_surgery_is_folded_as_well(here: Path, tmp_path: Path) -> None:
    rules = ps.parse_rules(RULE)
    ps.apply(ps.capture(str(here / "base")), rules).save(tmp_path / "surgery")
    ps.fold_checkpoint(tmp_path / "surgery", None, tmp_path / "mine")
    fs = BreakingFileSystem()
    fs.put(f"{tmp_path / 'surgery'}/", "/it/surgery/", recursive=True)
    asked = ("breaking://it/surgery", "breaking://it/base", "breaking://it/out")
    ps.fold_checkpoint(*asked)
    mine, other = content(taken(asked[-1], tmp_path / "out")), content(tmp_path / "mine")
    assert mine.pop(CERTIFICATE) != other.pop(CERTIFICATE)  # it names what was folded by URLs
    assert mine == other
    assert ps.verify(tmp_path / "out").changed
    for name in shards_of(here / "base"):
        data = fs.cat_file(f"/it/base/{name}")
        fs.pipe_file(f"/it/other/{name}", data[:-2] + bytes([data[-2] ^ 1, data[-1]]))
    for name in ("config.json", "model.safetensors.index.json"):
        fs.copy(f"/it/base/{name}", f"/it/other/{name}")
    with pytest.raises(ps.SurgeryError, match=r"PSG416.*breaking://it/other"):
        ps.fold_checkpoint(asked[0], "breaking://it/other", "breaking://it/out-2")
    assert not fs.find("/it/out-2")


def test_the_certificate_is_the_last_and_no_journal_is_left(elsewhere: BreakingFileSystem) -> None:
    ps.fold_checkpoint("breaking://it/lora", "breaking://it/base", "breaking://it/out")
    assert elsewhere.written[-1] == CERTIFICATE
    assert not [name for name in elsewhere.find("/it/out") if "/." in name]


def test_a_dry_run_reads_headers_alone(here: Path, elsewhere: BreakingFileSystem) -> None:
    found = estimate_fold("breaking://it/lora", "breaking://it/base", "breaking://it/out")
    assert found.base == "breaking://it/base"
    assert found.write == estimate_fold(here / "lora", here / "base", here / "dry").write
    assert not elsewhere.written
    shards = {name: (here / "base" / name).stat().st_size for name in shards_of(here / "base")}
    for name, size in shards.items():
        first = (here / "base" / name).read_bytes()[:8]
        header = 8 + int.from_bytes(first, "little")
        assert header < size
        assert sum(count for each, count in elsewhere.read if each == name) == 8 + header


def test_connections_that_break_and_come_back_do_no_harm(
    here: Path, tmp_path: Path, elsewhere: BreakingFileSystem
) -> None:
    first, *_, last = shards_of(here / "base")
    elsewhere.sending |= {f"out/{first}": 2, f"out/{CERTIFICATE}": 1, "out/.journal": 1}
    elsewhere.asking |= {f"base/{first}": 2, f"base/{last}": 2}
    ps.fold_checkpoint("breaking://it/lora", "breaking://it/base", "breaking://it/out")
    assert not any([*elsewhere.sending.values(), *elsewhere.asking.values()])
    check_same(here, taken("breaking://it/out", tmp_path / "out"))


@pytest.mark.parametrize("which", ["shard", "journal", "certificate", "base"])
def test_one_that_stays_broken_is_said_and_the_rest_is_done_later(
    here: Path, tmp_path: Path, elsewhere: BreakingFileSystem, which: str
) -> None:
    last = shards_of(here / "base")[-1]
    names = {"shard": last, "journal": ".journal", "certificate": CERTIFICATE}
    asked = ("breaking://it/lora", "breaking://it/base", "breaking://it/out")
    if which == "base":
        with pytest.raises(ps.SurgeryError) as refused:
            broken_after_planning(elsewhere, last, asked)
    else:
        elsewhere.sending[f"out/{names[which]}"] = 99
        with pytest.raises(ps.SurgeryError) as refused:
            ps.fold_checkpoint(*asked)
    assert refused.value.code == "PSG611"
    assert "breaking://it/" in refused.value.message
    assert "--resume" in str(refused.value.hint)
    assert not elsewhere.exists(f"/it/out/{CERTIFICATE}") or elsewhere.exists("/it/out/.journal")
    elsewhere.sending.clear()
    elsewhere.asking.clear()
    elsewhere.written.clear()
    if which != "journal":  # of that one, half is there, and nothing that it is of
        with pytest.raises(ps.SurgeryError, match="PSG610"):
            ps.fold_checkpoint(*asked)
    report = ps.fold_checkpoint(*asked, resume=True)
    assert set(report.resumed).isdisjoint(elsewhere.written)
    assert {"shard", "journal"} & {which} or report.resumed
    check_same(here, taken(asked[-1], tmp_path / "out"))


def broken_after_planning(
    elsewhere: BreakingFileSystem, name: str, asked: tuple[str, str, str]
) -> None:
    """Fold with a connection that breaks for one file of the base once another is written."""

    def told(_: int) -> None:
        elsewhere.asking[f"base/{name}"] = 99

    ps.fold_checkpoint(*asked, progress=told)


def test_a_fold_here_of_a_base_that_breaks_goes_on_here(
    here: Path, tmp_path: Path, elsewhere: BreakingFileSystem
) -> None:
    last, out = shards_of(here / "base")[-1], tmp_path / "out"
    with pytest.raises(ps.SurgeryError, match=r"PSG603.*breaking://it/base.*broke"):
        broken_after_planning(elsewhere, last, (str(here / "lora"), "breaking://it/base", str(out)))
    elsewhere.asking.clear()
    report = ps.fold_checkpoint(here / "lora", "breaking://it/base", out, resume=True)
    assert report.resumed
    check_same(here, out)


def test_the_spool_holds_no_more_than_two_files_of_a_thread(
    here: Path, tmp_path: Path, elsewhere: BreakingFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(elsewhere, "pause", 0.05)
    most = 0

    def told(_: int) -> None:
        nonlocal most
        with suppress(FileNotFoundError):  # one was given its name meanwhile
            found = [path.stat() for path in tmp_path.rglob("out.part/*.safetensors*")]
            most = max(most, sum(each.st_blocks * 512 >= each.st_size for each in found))

    ps.fold_checkpoint(here / "lora", here / "base", "breaking://it/out", progress=told)
    assert len(shards_of(here / "base")) > 3
    assert 0 < most <= 2
    assert not [*tmp_path.iterdir()]
    monkeypatch.undo()
    check_same(here, taken("breaking://it/out", tmp_path / "out"))


def test_what_was_damaged_there_is_written_again(
    here: Path, tmp_path: Path, elsewhere: BreakingFileSystem
) -> None:
    elsewhere.sending[f"out/{CERTIFICATE}"] = 99
    asked = ("breaking://it/lora", "breaking://it/base", "breaking://it/out")
    with pytest.raises(ps.SurgeryError, match="PSG611"):
        ps.fold_checkpoint(*asked)
    elsewhere.sending.clear()
    first, second, *_ = shards_of(here / "base")
    data = elsewhere.cat_file(f"/it/out/{first}")
    elsewhere.pipe_file(f"/it/out/{first}", data[:-1] + bytes([data[-1] ^ 1]))
    elsewhere.pipe_file(f"/it/out/{second}", elsewhere.cat_file(f"/it/out/{second}")[:-3])
    report = ps.fold_checkpoint(*asked, resume=True)
    assert report.resumed == tuple(shards_of(here / "base")[2:])
    check_same(here, taken(asked[-1], tmp_path / "out"))


@pytest.mark.parametrize(
    ("code", "places", "options"),
    [
        ("PSG602", {"out": "breaking://it/base"}, {}),
        ("PSG602", {"out": "breaking://it/base/inner"}, {}),
        ("PSG602", {"out": "breaking://it"}, {}),
        ("PSG602", {"out": "breaking://it/lora"}, {}),
        ("PSG601", {"out": "breaking://taken"}, {}),
        ("PSG611", {"base": "breaking://it/none"}, {}),
        ("PSG611", {"adapter": "breaking://it/none"}, {}),
        ("PSG904", {"base": "nowhere://it/base"}, {}),
        ("PSG904", {"out": "s3://key:secret@bucket/out"}, {}),
        ("PSG902", {"out": "gs://bucket/out"}, {}),
        ("PSG904", {}, {"part": "1/2"}),
        ("PSG904", {}, {"finish": True}),
        ("PSG904", {}, {"reversible": True}),
        ("PSG904", {}, {"dtype": "float33"}),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    elsewhere: BreakingFileSystem, code: str, places: dict[str, str], options: dict[str, Any]
) -> None:
    if code == "PSG902" and find_spec("gcsfs"):
        pytest.skip("gcsfs is installed")
    elsewhere.pipe_file("/taken/notes.txt", b"mine")
    before = {name: elsewhere.cat_file(name) for name in elsewhere.find("/")}
    asked = {name: f"breaking://it/{name}" for name in ("base", "out")}
    asked |= {"adapter": "breaking://it/lora", **places}
    with pytest.raises(ps.SurgeryError) as refused:
        ps.fold_checkpoint(**asked, **options)
    assert refused.value.code == code
    assert "secret" not in str(refused.value)
    assert {name: elsewhere.cat_file(name) for name in elsewhere.find("/")} == before


def test_the_base_that_an_adapter_names_is_used_and_never_written(
    here: Path, tmp_path: Path, elsewhere: BreakingFileSystem
) -> None:
    config = json.loads((here / "lora" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "breaking://it/base"
    elsewhere.pipe_file("/it/lora/adapter_config.json", json.dumps(config).encode())
    with pytest.raises(ps.SurgeryError, match="PSG602"):
        ps.fold_checkpoint("breaking://it/lora", here / "base", "breaking://it/base/out")
    ps.fold_checkpoint("breaking://it/lora", None, tmp_path / "out")
    said = json.loads((tmp_path / "out" / CERTIFICATE).read_bytes())
    assert said["base"] == "breaking://it/base"


def test_an_error_that_would_come_again_leaves_nothing(
    here: Path, tmp_path: Path, elsewhere: BreakingFileSystem
) -> None:
    """An adapter that changes nothing is noticed at the end."""
    file = tmp_path / "adapter_model.safetensors"
    learnt = load_file(here / "lora" / file.name)
    save_file({name: 0 * value for name, value in learnt.items()}, file)
    elsewhere.put_file(str(file), f"/it/lora/{file.name}")
    with pytest.raises(ps.SurgeryError, match="PSG415"):
        ps.fold_checkpoint("breaking://it/lora", "breaking://it/base", "breaking://it/out")
    assert not elsewhere.find("/it/out")


def test_the_files_of_a_base_stay_in_its_directory(elsewhere: BreakingFileSystem) -> None:
    elsewhere.pipe_file("/it/base/../../evil.txt", b"out of it")
    try:
        with pytest.raises(ps.SurgeryError, match=r"PSG207.*points out"):
            ps.fold_checkpoint("breaking://it/lora", "breaking://it/base", "breaking://it/out")
    finally:
        elsewhere.store.pop("/it/base/../../evil.txt")


def test_the_command_takes_urls_and_refuses_what_needs_files_here(
    here: Path, tmp_path: Path
) -> None:
    asked = ["fold", "breaking://it/lora", "--base", "breaking://it/base", "--json"]

    def run(*more: str) -> tuple[int, dict[str, Any]]:
        result = CliRunner().invoke(root, [*asked, *more])
        return result.exit_code, json.loads(result.stdout)

    for options in (["--verify"], ["--force"], ["--class", "LlamaModel"], ["--part", "1/2"]):
        code, said = run("-o", "breaking://it/out", *options)
        assert code == 2
        assert said["error"]["code"] in ("PSG901", "PSG904")
    code, said = run("-o", "breaking://it/out")
    assert (code, said["out"]) == (0, "breaking://it/out")
    check_same(here, taken("breaking://it/out", tmp_path / "out"))


def test_folds_here_import_no_fsspec(here: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from peftsurgery.formats.streamed_fold import fold_checkpoint;"
        "fold_checkpoint(*sys.argv[1:]); print('fsspec' in sys.modules)"
    )
    command = [sys.executable, "-c", program, *(str(here / name) for name in ("lora", "base"))]
    done = subprocess.run(
        [*command, str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False"]


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[BreakingProxy]:
    """A server of S3 on this machine, by way of a proxy that can break."""
    pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    with serving_s3() as (proxy, said):
        for name, value in said.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.slow
def test_a_real_server_of_s3_holds_what_is_folded(
    here: Path, tmp_path: Path, s3: BreakingProxy
) -> None:
    fs = fsspec.filesystem("s3")
    fs.mkdir("bucket")
    for name in ("base", "lora"):
        fs.put(f"{here / name}/", f"bucket/{name}/", recursive=True)
    asked = ("s3://bucket/lora", "s3://bucket/base", "s3://bucket/out")
    shard = shards_of(here / "base")[2]
    s3.name = f"/bucket/out/{shard}".encode()
    with pytest.raises(ps.SurgeryError, match=r"PSG611.*s3://bucket/out") as refused:
        ps.fold_checkpoint(*asked)
    assert "--resume" in str(refused.value.hint)
    assert s3.broken >= 3
    fs.invalidate_cache()
    assert not fs.exists(f"bucket/out/{shard}")
    assert not fs.exists(f"bucket/out/{CERTIFICATE}")
    with pytest.raises(ps.SurgeryError, match=r"PSG611.*s3://none/out"):
        ps.fold_checkpoint(*asked[:2], "s3://none/out")
    s3.name = b""
    report = ps.fold_checkpoint(*asked, resume=True)
    assert report.resumed
    fs.invalidate_cache()
    check_same(here, taken(asked[-1], tmp_path / "out"))
