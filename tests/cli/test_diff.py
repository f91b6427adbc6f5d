"""The command diff: what it prints, what it writes, and how it exits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.conftest import small_bert
from tests.diff.test_onnx_graph import write


@pytest.fixture(scope="module")
def wider(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The BERT of the other tests with another activation, seed and dropout."""
    path = small_bert(tmp_path_factory.mktemp("wider") / "bert", width=32)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    return path


@pytest.fixture(scope="module")
def adapted(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved surgery of the BERT."""
    import peftsurgery as ps

    path = tmp_path_factory.mktemp("adapted") / "lora"
    ps.apply(ps.capture(str(bert)), "lora_qv").save(path)
    return path


def test_a_model_against_itself_is_no_difference_and_no_failure(run: Any, bert: Path) -> None:
    outcome = run("diff", bert, bert, "--weights")
    assert outcome.code == 0, outcome.err
    assert "no difference" in outcome.out


@pytest.mark.slow
def test_a_surgery_is_what_it_adds_to_its_base(run: Any, bert: Path, adapted: Path) -> None:
    outcome = run("diff", bert, adapted)
    assert outcome.code == 1, outcome.err
    line = "+ encoder.layer.{0..1}.attention.self.query: lora_qv(rank 8) on attn.q ×2"
    assert line in outcome.out
    found = run("diff", bert, adapted, "--json")
    assert found.code == 1
    assert found.json["schema"] == "peftsurgery.diff/1"
    assert found.json["differs"] == {"structure": True, "config": False, "weights": False}
    added = found.json["headline"]
    assert added["b"]["parameters"] - added["a"]["parameters"] == 2 * 2 * 2 * 8 * 32


@pytest.mark.slow
def test_a_peft_adapter_is_what_it_adds_to_its_base(
    run: Any, bert: Path, adapted: Path, tmp_path: Path
) -> None:
    import peftsurgery as ps

    ps.to_peft(ps.load(adapted), tmp_path / "peft")
    outcome = run("diff", bert, tmp_path / "peft", "--base", bert)
    assert outcome.code == 1, outcome.err
    assert "+ encoder.layer.{0..1}.attention.self.query: " in outcome.out


@pytest.mark.slow
def test_a_folded_checkpoint_is_low_rank_where_its_adapter_was(
    run: Any, bert: Path, tmp_path: Path
) -> None:
    import peftsurgery as ps

    torch.manual_seed(0)
    operated = ps.apply(ps.capture(str(bert)), "lora_qv", rank=2)
    for value in operated.learnt().values():
        torch.nn.init.normal_(value)
    operated.save(tmp_path / "surgery")
    assert run("fold", tmp_path / "surgery", "-o", tmp_path / "folded").code == 0
    outcome = run("diff", bert, tmp_path / "folded", "--weights", "--json")
    assert (outcome.code, outcome.json["differs"]["structure"]) == (1, False)
    changed = {each["where"]: each["text"] for each in outcome.json["changes"]}
    assert changed.keys() == {
        f"encoder.layer.{{0..1}}.attention.self.{part}.weight" for part in ("query", "value")
    }
    assert all(text.startswith("low-rank (rank 2)") for text in changed.values())


FACTORY = """
from transformers import BertConfig, BertModel

def make():
    sizes = dict(vocab_size=9, hidden_size=8, num_attention_heads=2, intermediate_size=12)
    return BertModel(BertConfig(**sizes, num_hidden_layers=1, hidden_act="{act}"))
"""


@pytest.mark.slow
def test_two_versions_of_a_factory_differ_by_what_was_changed(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, act in enumerate(("relu", "gelu")):
        (tmp_path / f"factory_{number}.py").write_text(FACTORY.format(act=act))
    monkeypatch.syspath_prepend(str(tmp_path))
    outcome = run("diff", "factory_0:make", "factory_1:make", "--weights")
    assert outcome.code == 1, outcome.err
    assert "~ config.hidden_act: relu → gelu" in outcome.out
    assert "~ encoder.layer.0.intermediate.intermediate_act_fn: relu → gelu" in outcome.out
    assert "Weights" not in outcome.out


def test_onnx_files_are_models_too(run: Any, tmp_path: Path) -> None:
    one, other = write(tmp_path / "a.onnx"), write(tmp_path / "b.onnx", act="Tanh")
    assert run("diff", one, one).code == 0
    outcome = run("diff", one, other, "--format", "md")
    assert outcome.code == 1, outcome.err
    assert "- `~` `act` `Relu → Tanh`" in outcome.out
    one.write_bytes(b"no model")
    assert "PSG222" in run("diff", one, other).err


@pytest.mark.slow
def test_only_what_is_asked_for_fails(run: Any, bert: Path, wider: Path) -> None:
    assert run("diff", bert, wider).code == 1
    assert run("diff", bert, wider, "--fail-on", "config").code == 1
    assert run("diff", bert, wider, "--weights", "--fail-on", "weights").code == 0
    outcome = run("diff", bert, wider, "--fail-on", "weights")
    assert (outcome.code, "PSG901" in outcome.err) == (2, True)


@pytest.mark.slow
def test_it_is_written_where_it_is_asked_for(
    run: Any, bert: Path, wider: Path, tmp_path: Path
) -> None:
    out = tmp_path / "change.md"
    outcome = run("diff", bert, wider, "--format", "md", "-o", out)
    assert (outcome.code, outcome.out) == (1, "")
    text = out.read_text(encoding="utf-8")
    assert text.startswith("### ")
    assert "- `~` `config.hidden_act` `gelu → relu`" in text
    assert "- `~` `encoder.layer.{0..1}.intermediate.intermediate_act_fn` `gelu → relu` ×2" in text
    assert run("diff", bert, wider, "--format", "md", "-o", out).code == 3
    assert run("diff", bert, wider, "--format", "md", "-o", bert / "config.json").code == 3


def git(folder: Path, *arguments: str, check: bool = True) -> str:
    """What git prints, in a repository whose hooks and tools find the command."""
    tools = folder.with_name(f"{folder.name}-bin")
    tools.mkdir(exist_ok=True)
    command = tools / "peftsurgery"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m peftsurgery "$@"\n')
    command.chmod(0o755)
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=check,
    )  # fmt: skip
    return done.stdout + ("" if check else f"{done.stderr} exit {done.returncode}")


@pytest.mark.slow
def test_git_shows_and_checks_rules(tmp_path: Path) -> None:
    """The recipes of README for rule files, in a real repository."""
    rule = "name: twice\nrules: [{match: linear, rewrite: y + y, fold: {W: 2 * W, b: 2 * b}}]\n"
    git(tmp_path, "init", "-q")
    (tmp_path / ".gitattributes").write_text("rules/*.yaml diff=peftsurgery-rules\n")
    git(tmp_path, "config", "diff.peftsurgery-rules.textconv", "peftsurgery rules show")
    git(tmp_path, "config", "difftool.peftsurgery.cmd", 'peftsurgery diff "$LOCAL" "$REMOTE"')
    (tmp_path / "rules").mkdir()
    file = tmp_path / "rules" / "twice.yaml"
    file.write_text(rule)
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "one")
    file.write_text(rule.replace("y + y", "2 * y"))
    shown = git(tmp_path, "diff")
    assert "-     y ← y + y" in shown
    assert "+     y ← 2·y" in shown
    told = git(tmp_path, "difftool", "-y", "-t", "peftsurgery")
    assert "~ rule 1: y ← 2·y (was y + y)" in told
    assert "~ rule 1: rewrite: the same on random tensors" in told
    hook = tmp_path / ".git" / "hooks" / "pre-commit"
    hook.write_text(
        "#!/bin/sh\ngit diff --cached --name-only --diff-filter=d -- 'rules/*.yaml' "
        "| xargs -r peftsurgery rules check\n"
    )
    hook.chmod(0o755)
    git(tmp_path, "commit", "-qam", "two")
    file.write_text(rule.replace("2 * W", "3 * W"))
    refused = git(tmp_path, "commit", "-qam", "three", check=False)
    assert "PSG130" in refused
    assert not refused.endswith("exit 0")


@pytest.mark.slow
def test_git_shows_it(bert: Path, tmp_path: Path) -> None:
    """The recipe of README, in a real repository."""
    git(tmp_path, "init", "-q")
    (tmp_path / ".gitattributes").write_text("*.safetensors diff=peftsurgery\n")
    git(tmp_path, "config", "diff.peftsurgery.textconv", "peftsurgery diff --describe")
    small = tmp_path / "model.safetensors"
    small.write_bytes((bert / "model.safetensors").read_bytes())
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "one")
    other = small_bert(tmp_path.with_name("other"), width=16)
    small.write_bytes((other / "model.safetensors").read_bytes())
    shown = git(tmp_path, "diff")
    assert "-embeddings.word_embeddings.weight F32[99,32] " in shown
    assert "+embeddings.word_embeddings.weight F32[99,16] " in shown
