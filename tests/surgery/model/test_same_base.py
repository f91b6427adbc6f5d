"""A surgery knows its base by the weights; another one is refused, or let through and said."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftsurgery as ps
from peftsurgery.capture.builds import Build
from peftsurgery.checkpoint.card import card_of, hub_id
from peftsurgery.surgery.plan.cut import notes_of
from tests.formats.made import model_directory, saved_surgery
from tests.models.zoo import ZOO


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory("llama", tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture(scope="module")
def surgery(base: Path) -> Path:
    return saved_surgery(base, base.parent / "surgery")


def copied(base: Path, to: Path, **changes: torch.Tensor) -> Path:
    """The same model in another directory, some of its tensors changed."""
    shutil.copytree(base, to)
    tensors = {**load_file(to / "model.safetensors"), **changes}
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def told(model: ps.OperatedModel) -> list[str]:
    """What a report says of where the operations come from."""
    found = notes_of(model.operations)
    assert set(found) <= set(model.report.notes)
    return found


def refused(surgery: Path, base: Any) -> str:
    with pytest.raises(ps.SurgeryError) as caught:
        ps.load(surgery, base=base)
    assert caught.value.code == "PSG319"
    assert "--allow-other-base" in str(caught.value)
    return caught.value.message


def test_the_manifest_has_fingerprint_versions_seed_and_date(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(1234)
    ps.apply(ps.capture(str(base)), "lora_qv").save(tmp_path)
    manifest = json.loads((tmp_path / "surgery.json").read_text())
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["versions"].keys() == {"torch", "transformers", "peftsurgery"}
    assert manifest["seed"] == manifest["operations"][0]["seed"] == 1234
    assert manifest["date"].endswith("Z")
    tensors = load_file(base / "model.safetensors")
    recorded = manifest["fingerprint"]["tensors"]
    assert recorded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        shape = ",".join(map(str, tensor.shape))
        assert recorded[name].startswith(f"F32[{shape}] ")


@pytest.mark.slow
def test_a_base_that_moved_or_was_sharded_or_is_in_memory_is_the_same(
    base: Path, surgery: Path, tmp_path: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for same in (copied(base, tmp_path / "copy"), tmp_path / "shards"):
        assert not told(ps.load(surgery, base=str(same)))
    on_live = ps.apply(ps.capture(model), "lora_qv")
    on_live.save(tmp_path / "live")
    for saved in (surgery, tmp_path / "live"):
        for again in (str(base), ps.capture(model), ps.capture(ZOO["llama"].build())):
            assert not told(ps.load(saved, base=again))


@pytest.mark.slow
def test_a_base_with_other_values_is_refused_or_let_through_and_said(
    base: Path, surgery: Path, tmp_path: Path
) -> None:
    norm = load_file(base / "model.safetensors")["model.norm.weight"]
    other = copied(base, tmp_path / "other", **{"model.norm.weight": norm + 1e-6})
    assert "1 of 21 tensors have other values, 'model.norm.weight' first" in refused(
        surgery, str(other)
    )
    assert refused(surgery, ps.capture(LlamaForCausalLM.from_pretrained(other)))
    with pytest.raises(ps.SurgeryError, match="PSG319"):
        ps.fold_to_directory(surgery, tmp_path / "out", base=str(other))
    assert not (tmp_path / "out").exists()
    result = ps.fold_to_directory(surgery, tmp_path / "out", base=str(other), allow_other_base=True)
    assert any("other values" in note for note in result.notes)
    record = json.loads((tmp_path / "out/peftsurgery.json").read_text())
    assert "other values" in record["folded"][0]["other_base"]
    assert "**made for another base**" in (tmp_path / "out/README.md").read_text()
    # it is saved on that base from now on, and what it was made for is still said
    ps.load(surgery, str(other), allow_other_base=True).save(tmp_path / "again")
    assert "other values" in told(ps.load(tmp_path / "again"))[0]
    assert refused(tmp_path / "again", str(base))


@pytest.mark.slow
def test_a_base_in_another_dtype_is_compared_by_a_cast_or_refused_by_its_dtype(
    base: Path, surgery: Path, tmp_path: Path
) -> None:
    half = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    said = refused(surgery, ps.capture(half))
    assert "cannot be compared" in said
    assert "is in BF16 and was recorded in F32" in said
    ps.apply(ps.capture(half), "lora_qv").save(tmp_path / "on_half")
    (note,) = told(ps.load(tmp_path / "on_half", str(base)))
    assert "recorded in BF16" in note
    norm = load_file(base / "model.safetensors")["model.norm.weight"]
    other = copied(base, tmp_path / "other", **{"model.norm.weight": norm * 1.1})
    assert "other values" in refused(tmp_path / "on_half", str(other))


@pytest.mark.slow
def test_a_head_that_the_surgery_trained_may_start_from_anything(tmp_path: Path) -> None:
    model: Any = ZOO["bert"].build()
    operated = ps.apply(ps.capture(model), "lora_qv", train=["classifier"])
    operated.save(tmp_path)
    again: Any = ZOO["bert"].build()
    nn.init.normal_(again.classifier.weight)
    assert not told(ps.load(tmp_path, ps.capture(again)))
    nn.init.normal_(again.bert.pooler.dense.weight)
    assert "'bert.pooler.dense.weight' first" in refused(tmp_path, ps.capture(again))


@pytest.mark.slow
def test_ties_that_are_stored_once_or_twice_are_the_same(tmp_path: Path) -> None:
    config = ZOO["llama"].build().config
    config.tie_word_embeddings = True
    LlamaForCausalLM(config).save_pretrained(tmp_path / "once")
    tensors = load_file(tmp_path / "once" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    embedding = tensors["model.embed_tokens.weight"].clone()
    twice = copied(tmp_path / "once", tmp_path / "twice", **{"lm_head.weight": embedding})
    for one, other in ((tmp_path / "once", twice), (twice, tmp_path / "once")):
        saved = saved_surgery(one, tmp_path / f"on_{one.name}")
        assert not told(ps.load(saved, base=str(other)))


def test_a_surgery_without_a_fingerprint_says_that_nothing_was_compared(
    base: Path, surgery: Path, tmp_path: Path
) -> None:
    shutil.copytree(surgery, tmp_path / "old")
    manifest = json.loads((surgery / "surgery.json").read_text())
    for key in ("fingerprint", "versions", "seed", "date"):
        del manifest[key]
    (tmp_path / "old/surgery.json").write_text(json.dumps(manifest))
    (note,) = told(ps.load(tmp_path / "old"))
    assert "was not compared" in note or "were not compared" in note
    manifest["fingerprint"] = {"tensors": {"a": "nothing of the kind"}}
    for damaged in ([], {"tensors": 3}, json.loads((surgery / "surgery.json").read_text())):
        if isinstance(damaged, dict) and "fingerprint" in damaged:
            damaged = {**damaged["fingerprint"], "tensors": {"a": "F32[2] zz"}}
        (tmp_path / "old/surgery.json").write_text(json.dumps({**manifest, "fingerprint": damaged}))
        with pytest.raises(ps.SurgeryError, match="PSG605"):
            ps.load(tmp_path / "old")


def adapter_for(base: Path, folder: Path) -> Path:
    """An adapter that peft saved, with values that show."""
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_nothing_is_folded_twice(base: Path, surgery: Path, tmp_path: Path) -> None:
    adapter = adapter_for(base, tmp_path / "adapter")
    ps.fold_to_directory(surgery, tmp_path / "first", base=str(base))
    with pytest.raises(ps.SurgeryError, match=r"PSG319.*'lora_qv' was folded into it"):
        ps.fold_to_directory(surgery, tmp_path / "twice", base=str(tmp_path / "first"))
    folded = tmp_path / "folded"
    ps.fold_to_directory(adapter, folded)
    read, live = ps.capture(str(folded)), ps.capture(LlamaForCausalLM.from_pretrained(folded))
    for graph in (read, live):
        with pytest.raises(ps.SurgeryError, match=r"PSG319.*'default' was folded into it"):
            ps.from_peft(graph, adapter)
        with pytest.raises(ps.SurgeryError, match="PSG319"):
            ps.load(surgery, base=graph)
    with pytest.raises(ps.SurgeryError, match="PSG319"):
        ps.fold_to_directory(adapter, tmp_path / "twice", base=read)
    assert not (tmp_path / "twice").exists()
    ps.fold_to_directory(adapter, tmp_path / "twice", base=read, allow_other_base=True)
    record = json.loads((tmp_path / "twice/peftsurgery.json").read_text())
    assert [bool(entry["other_base"]) for entry in record["folded"]] == [False, True]


@pytest.mark.slow
def test_what_is_made_for_a_folded_base_goes_on_it(
    base: Path, surgery: Path, tmp_path: Path
) -> None:
    folded = tmp_path / "folded"
    ps.fold_to_directory(surgery, folded)
    second = saved_surgery(folded, tmp_path / "second", "ia3")
    adapter = adapter_for(folded, tmp_path / "adapter")
    for number, made in enumerate((second, adapter)):
        ps.fold_to_directory(made, tmp_path / str(number))
        record = json.loads((tmp_path / str(number) / "peftsurgery.json").read_text())
        assert len(record["folded"]) == 2
        assert not any(entry["other_base"] for entry in record["folded"])


def test_a_folded_directory_says_what_is_in_it_and_has_a_card(
    base: Path, surgery: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    ps.fold_to_directory(surgery, tmp_path / "out")
    record = json.loads((tmp_path / "out/peftsurgery.json").read_text())
    (entry,) = record["folded"]
    assert (entry["adapter"], entry["method"]) == ("lora_qv", "lora_qv")
    assert entry["settings"] == {"rank": 8, "alpha": 16, "dropout": 0.0, "stabilised": False}
    assert ps.parse_rules(entry["rules"]).name == "lora_qv"
    manifest = json.loads((surgery / "surgery.json").read_text())
    assert record["fingerprint"]["digest"] == manifest["fingerprint"]["digest"]
    assert record["base"] == str(base)
    assert record["date"] == "1970-01-01T00:00:00Z"
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert str(base.parent) not in card
    assert f"# {base.name}, folded" in card
    assert "`lora_qv`: lora_qv(rank=8" in card
    with_card = copied(base, tmp_path / "with_card")
    (with_card / "README.md").write_text("# mine")
    ps.fold_to_directory(surgery, tmp_path / "other", base=str(with_card))
    assert not (tmp_path / "other/README.md").exists()


def test_a_card_names_a_base_that_is_on_the_hub_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cache = "/home/somebody/.cache/huggingface/hub"
    (tmp_path / "owner/local").mkdir(parents=True)
    for base, expected in {
        f"{cache}/models--owner--na.me-1/snapshots/0a1b": "owner/na.me-1",
        f"{cache}/models--gpt2/snapshots/0a1b": "gpt2",
        "owner/name": "owner/name",
        "gpt2": "gpt2",
        "owner/local": None,
        "owner": None,
        str(tmp_path): None,
        "../name": None,
        "package.module:factory": None,
        "models--mine--own/base": None,
        "a/b/c": None,
        "": None,
    }.items():
        assert hub_id(base) == expected, base
        head = yaml.safe_load(card_of({"base": base, "folded": []}, True).split("---")[1])
        assert head.get("base_model") == expected


def test_an_export_on_the_right_base_says_nothing_of_an_earlier_one(
    base: Path, tmp_path: Path
) -> None:
    right = ps.apply(ps.capture(str(base)), "lora_qv")
    wrong = ps.apply(ps.capture(str(base)), "lora_qv")
    (operation,) = wrong.operations
    changed = replace(operation, origin=replace(operation.origin, other_base="other"))
    wrong._plan = replace(wrong._plan, operations=(changed,))
    for export in (ps.to_peft, ps.to_adapterhub):
        out = tmp_path / export.__name__
        export(wrong, out)
        assert json.loads((out / "peftsurgery.json").read_text())["exported"][0]["other_base"]
        export(right, out)
        assert not (out / "peftsurgery.json").exists()
        (out / "peftsurgery.json").write_text('{"not": "ours"}')
        export(right, out)
        assert (out / "peftsurgery.json").exists()


def test_what_is_saved_over_a_surgery_has_nothing_of_the_older_ones_build(
    base: Path, tmp_path: Path
) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer_config.json", "vocab.txt"):
        (tokenizer / name).write_text("{}")
    built = ps.capture(str(base))
    built.source.build = Build(kind=type(built.source.module).__name__, tokenizer=tokenizer)
    out = tmp_path / "out"
    ps.apply(built, "lora_qv").save(out)
    assert (out / "vocab.txt").exists()
    ps.apply(ps.capture(str(base)), "lora_qv").save(out)
    assert sorted(file.name for file in out.iterdir() if file.is_file()) == [
        "adapter.safetensors",
        "surgery.json",
    ]
    (out / "vocab.txt").write_text("a user's own")  # no build: nothing that is ours
    (out / "tokenizer_config.json").write_text("{}")
    (out / "surgery.json").write_text("damaged")
    ps.apply(ps.capture(str(base)), "lora_qv").save(out)
    assert (out / "vocab.txt").exists()


def factory() -> nn.Module:
    """A model of random weights, which are not seeded here."""
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model.eval()


CALLS: list[int] = []


def wayward() -> nn.Module:
    """A model of other weights at every call."""
    CALLS.append(len(CALLS))
    torch.manual_seed(len(CALLS))
    return factory()


@pytest.mark.slow
def test_a_factory_makes_the_same_base_again_or_is_told_that_it_must(tmp_path: Path) -> None:
    ps.apply(ps.capture(f"{__name__}:factory"), "lora_qv").save(tmp_path / "same")
    torch.manual_seed(99)
    torch.randn(7)
    assert not told(ps.load(tmp_path / "same"))
    ps.apply(ps.capture(f"{__name__}:wayward"), "lora_qv").save(tmp_path / "other")
    with pytest.raises(ps.SurgeryError, match=r"PSG319(.|\n)*same weights at every call"):
        ps.load(tmp_path / "other")
