"""Folds on files that write more than the base's tensors: ties that break, other vocabularies.

The oracles are the fold in memory, which lets transformers write the model, and what transformers
and peft compute.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import peftsurgery as ps
from peftsurgery.errors import SurgeryError
from peftsurgery.formats.streamed_fold import estimate_fold
from tests.formats.peft.test_vocabulary import KINDS, NEW, OLD, VARIANTS, tokenizer, trained
from tests.formats.stored import adapter_at, base_at, content, tensors_of

pytestmark = pytest.mark.filterwarnings("ignore")
WIDE = {"intermediate_size": 48, "tie_word_embeddings": True}
IDS = torch.arange(10).reshape(2, 5)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_at(
        tmp_path_factory.mktemp("tied") / "base", "Llama", torch.bfloat16, "10KB", **WIDE
    )


def config_of(folder: Path) -> dict[str, Any]:
    said: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return said


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: torch.Tensor = model(IDS).logits
    return found


def is_as_in_memory(out: Path, whole: Path) -> None:
    """Hold a directory to what the fold in memory writes: tensors, config, logits."""
    mine, theirs = tensors_of(out), tensors_of(whole)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-6)
    wanted = config_of(whole)
    assert {key: config_of(out).get(key) for key in wanted} == wanted
    torch.testing.assert_close(logits(out), logits(whole), rtol=0, atol=1e-5)
    index = out / "model.safetensors.index.json"
    if index.is_file():
        said = json.loads(index.read_text())
        assert said["weight_map"].keys() == mine.keys()
        assert said["metadata"]["total_size"] == sum(value.nbytes for value in mine.values())
        for name, shard in said["weight_map"].items():
            assert name in load_file(out / shard)


TIES: dict[str, tuple[dict[str, Any], bool]] = {
    "head": ({"target_modules": ["lm_head", "q_proj"]}, True),
    "embeddings": ({"target_modules": ["embed_tokens"]}, True),
    "trained": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, True),
    "trained alike": (
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
        False,
    ),
    "alike": ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, False),
}


@pytest.mark.parametrize("case", TIES)
def test_a_tie_that_breaks_is_written_as_a_fold_in_memory_writes_it(
    tmp_path: Path, tied: Path, case: str
) -> None:
    config, breaks = TIES[case]
    adapter, before = adapter_at(tmp_path / "lora", tied, **config), content(tied)
    report = ps.fold_checkpoint(adapter, tied, tmp_path / "out")
    ps.fold_to_directory(adapter, tmp_path / "whole", base=str(tied))
    is_as_in_memory(tmp_path / "out", tmp_path / "whole")
    assert report.untied is breaks
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is not breaks
    assert ps.verify(tmp_path / "out").tensors == len(tensors_of(tied)) + breaks
    ps.unfold_checkpoint(tmp_path / "out", tmp_path / "back")
    before.pop("pytorch_model.bin")
    assert content(tmp_path / "back") == before


def test_parts_and_runs_that_are_resumed_write_it_as_well(
    tmp_path: Path, tied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    adapter = adapter_at(tmp_path / "lora", tied, target_modules=["lm_head"])
    report = ps.fold_checkpoint(adapter, tied, tmp_path / "out")
    for part in ("3/3", "1/3", "2/3"):
        ps.fold_checkpoint(adapter, tied, tmp_path / "parts", part=part)
    assert content(tmp_path / "parts") == content(tmp_path / "out")
    stopped = []

    def stop(size: int) -> None:
        stopped.append(size)
        if len(stopped) > 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ps.fold_checkpoint(adapter, tied, tmp_path / "again", progress=stop)
    ps.fold_checkpoint(adapter, tied, tmp_path / "again", resume=True)
    assert content(tmp_path / "again") == content(tmp_path / "out")
    assert report.written == sum(value.nbytes for value in tensors_of(tmp_path / "out").values())


def test_a_dry_run_counts_the_tensor_that_is_written_apart(tmp_path: Path, tied: Path) -> None:
    adapter = adapter_at(tmp_path / "lora", tied, target_modules=["lm_head"])
    found = estimate_fold(adapter, tied, tmp_path / "out")
    ps.fold_checkpoint(adapter, tied, tmp_path / "out")
    size = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert found.tensors == len(tensors_of(tied)) + 1
    assert 0 <= size - found.write < 20_000


def test_what_changes_more_than_values_has_no_residual(tmp_path: Path, tied: Path) -> None:
    adapter = adapter_at(tmp_path / "lora", tied, target_modules=["lm_head"])
    with pytest.raises(SurgeryError, match=r"PSG416.*written apart"):
        ps.fold_checkpoint(adapter, tied, tmp_path / "out", reversible=True)
    alike = adapter_at(tmp_path / "alike", tied, **TIES["alike"][0])
    ps.fold_checkpoint(alike, tied, tmp_path / "out", reversible=True)
    ps.unfold_checkpoint(tmp_path / "out", tmp_path / "back")
    assert tensors_of(tmp_path / "back").keys() == tensors_of(tied).keys()


def test_a_saved_surgery_says_by_itself_what_becomes_unlike(tmp_path: Path, tied: Path) -> None:
    model = ps.apply(ps.capture(str(tied)), "lora_embedding")
    model.bind()
    with torch.no_grad():
        for value in model.learnt(*model.active).values():
            value.add_(torch.randn(value.shape) * 0.1)
    model.save(tmp_path / "surgery")
    said = json.loads((tmp_path / "surgery/surgery.json").read_text())["fold"]
    assert said["untied"] == {"tie_word_embeddings": False}
    ps.fold_checkpoint(tmp_path / "surgery", None, tmp_path / "out")
    ps.fold_to_directory(tmp_path / "surgery", tmp_path / "whole")
    is_as_in_memory(tmp_path / "out", tmp_path / "whole")


def test_a_head_gets_its_name_beside_names_without_their_first_part(tmp_path: Path) -> None:
    base = base_at(tmp_path / "base", "GPT2", torch.float32, "1GB")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.transformer.save_pretrained(tmp_path / "bare")  # as the hub's gpt2 is stored
    (tmp_path / "bare/config.json").write_bytes((base / "config.json").read_bytes())
    adapter = adapter_at(tmp_path / "lora", base, target_modules=["lm_head"])
    ps.fold_checkpoint(adapter, tmp_path / "bare", tmp_path / "out")
    ps.fold_to_directory(adapter, tmp_path / "whole", base=str(base))
    torch.testing.assert_close(
        logits(tmp_path / "out"), logits(tmp_path / "whole"), rtol=0, atol=1e-5
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Bases whose vocabulary adapters resize, tied and not."""
    found = {}
    for is_tied in (True, False):
        torch.manual_seed(0)
        kind: Any = LlamaForCausalLM.config_class
        config = kind(vocab_size=OLD, tie_word_embeddings=is_tied, **KINDS[LlamaForCausalLM])
        found[is_tied] = tmp_path_factory.mktemp("small") / "base"
        LlamaForCausalLM(config).save_pretrained(found[is_tied])
        tokenizer(found[is_tied], OLD)
    return found


QUICK = ["embeddings and head saved", "trained tied", "LoRA of both", "only the head"]
SLOW = [case for case in VARIANTS if case not in (*QUICK, "nothing but LoRA")]


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(c, marks=pytest.mark.slow) for c in SLOW)])
def test_another_vocabulary_is_written_as_a_fold_in_memory_writes_it(
    tmp_path: Path, small: dict[bool, Path], case: str, is_tied: bool
) -> None:
    base, lora = small[is_tied], tmp_path / "lora"
    trained(base, lora, case)
    tokenizer(tmp_path, NEW).save_pretrained(lora)
    before = content(base)
    # of a tied table, that the other is trained says nothing of where its own new rows are
    one_sided = is_tied and case in ("only the embeddings", "only the head")
    if VARIANTS[case][3 if is_tied else 2] or one_sided:
        with pytest.raises(SurgeryError, match=r"PSG416.*in no file"):
            ps.fold_checkpoint(lora, base, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    ps.fold_checkpoint(lora, base, tmp_path / "out")
    ps.fold_to_directory(lora, tmp_path / "whole", base=str(base))
    is_as_in_memory(tmp_path / "out", tmp_path / "whole")
    assert config_of(tmp_path / "out")["vocab_size"] == NEW
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (lora / "tokenizer.json").read_bytes()
    assert ps.verify(tmp_path / "out").changed
    ps.unfold_checkpoint(tmp_path / "out", tmp_path / "back")
    assert content(tmp_path / "back") == content(base) == before
    with pytest.raises(SurgeryError, match=r"PSG416.*(vocabulary|apart)"):
        ps.fold_checkpoint(lora, base, tmp_path / "other", reversible=True)
