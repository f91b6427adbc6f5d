"""fold_to_directory: plain transformers loads what it writes, and nothing is half-written."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import peftsurgery as ps
from peftsurgery.checkpoint.fold_report import FoldReport
from peftsurgery.cli.root import root
from peftsurgery.formats import pretrained
from tests.formats.made import expected, files_of, minilm, model_directory, saved_surgery
from tests.models.captured import captured
from tests.models.zoo import ZOO
from tests.surgery.reference import randomise


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Llama's directory and a surgery on it."""
    folder = tmp_path_factory.mktemp("llama")
    model = model_directory("llama", folder / "model")
    return model, saved_surgery(model, folder / "surgery")


def command(*arguments: Any) -> tuple[int, str, str]:
    result = CliRunner().invoke(root, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_plain_transformers_loads_the_operated_model(name: str, tmp_path: Path) -> None:
    model = model_directory(name, tmp_path / "model")
    surgery = saved_surgery(model, tmp_path / "surgery", "lora_qv" if name != "gpt2" else "dora")
    result = ps.fold_to_directory(surgery, tmp_path / "out", verify=True)
    inputs = ZOO[name].inputs(3, 6)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        logits = again(**inputs).logits
        operated = ps.load(surgery).eval()
        torch.testing.assert_close(logits, operated(**inputs).logits, atol=1e-6, rtol=1e-5)
    if name != "gpt2":  # the hooks know separate query and value modules, and no DoRA
        wanted = expected(ZOO[name].build(), operated, inputs)
        torch.testing.assert_close(logits, wanted, atol=1e-6, rtol=1e-5)
    assert result.verified is not None
    assert result.verified <= 1e-6


def test_the_result_names_the_changed_weights_and_by_how_much(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    result = ps.fold_to_directory(llama[1], tmp_path / "out")
    before = load_file(llama[0] / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    differ = {name: after[name] - before[name] for name in after}
    differ = {name: gap for name, gap in differ.items() if gap.any()}
    assert {change["name"] for change in result.to_dict()["changed"]} == differ.keys()
    assert {name.split(".")[-2] for name in differ} == {"q_proj", "v_proj"}
    for name, change in result.changed.items():
        gap = differ[name]
        assert change["largest"] == pytest.approx(gap.abs().max().item())
        assert change["relative"] == pytest.approx((gap.norm() / before[name].norm()).item())
    assert "changed 4 of" in str(result)


def test_bf16_is_read_and_written_as_bf16_and_rounded_once(tmp_path: Path) -> None:
    model = model_directory("llama", tmp_path / "model", torch.bfloat16)
    surgery = saved_surgery(model, tmp_path / "surgery")
    ps.fold_to_directory(surgery, tmp_path / "out", verify=True)
    before, learnt = (
        load_file(model / "model.safetensors"),
        load_file(surgery / "adapter.safetensors"),
    )
    after = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj"
    A, B = learnt[f"{name}.lora_qv.A"], learnt[f"{name}.lora_qv.B"]
    wide = before[f"{name}.weight"].double() + 2.0 * (B.double() @ A.double())
    assert torch.equal(after[f"{name}.weight"], wide.float().to(torch.bfloat16))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16


def test_a_broken_tie_stays_broken_in_the_directory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ZOO["llama"].build().config
    config.tie_word_embeddings = True
    tied = transformers.LlamaForCausalLM(config).eval()
    tied.save_pretrained(tmp_path / "model")
    surgery = saved_surgery(tmp_path / "model", tmp_path / "surgery", "lora_embedding")
    result = ps.fold_to_directory(surgery, tmp_path / "out", verify=True)
    assert result.untied
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again.lm_head.weight, tied.lm_head.weight)
    assert not torch.equal(again.model.embed_tokens.weight, tied.lm_head.weight)


@pytest.mark.slow
@pytest.mark.parametrize("verify", [True, False])
def test_every_weight_of_a_broken_tie_is_in_the_directory(verify: bool, tmp_path: Path) -> None:
    model = model_directory("bart", tmp_path / "model")
    surgery = saved_surgery(model, tmp_path / "surgery", "lora_embedding")
    result = ps.fold_to_directory(surgery, tmp_path / "out", verify=verify)
    assert result.untied
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == ZOO["bart"].build().state_dict().keys()


@pytest.mark.parametrize("verify", [True, False])
def test_a_weight_that_was_not_written_is_noticed(
    verify: bool, llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = transformers.LlamaForCausalLM
    save, lost = kind.save_pretrained, "model.norm.weight"

    def forget(self: Any, folder: Path) -> None:
        save(self, folder, state_dict={k: v for k, v in self.state_dict().items() if k != lost})

    monkeypatch.setattr(kind, "save_pretrained", forget)
    with pytest.raises(ps.SurgeryError, match=f"PSG410.*'{lost}'"):
        ps.fold_to_directory(llama[1], tmp_path / "out", verify=verify)
    assert not (tmp_path / "out").exists()


def test_a_peft_directory_folds_to_what_peft_merges(tmp_path: Path) -> None:
    model = model_directory("llama", tmp_path / "model")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "o_proj"])
    wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path / "adapter")
    code, _, errors = command("fold", tmp_path / "adapter", "-o", tmp_path / "out", "--verify")
    assert code == 0, errors
    merged = wrapped.merge_and_unload().state_dict()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert again.keys() == merged.keys()
    for name, value in merged.items():
        torch.testing.assert_close(again[name], value, atol=1e-7, rtol=1e-6)


@pytest.mark.slow
def test_minilm_comes_with_its_tokenizer_its_pipeline_and_its_other_files(tmp_path: Path) -> None:
    surgery = saved_surgery(minilm(), tmp_path / "surgery")
    code, _, errors = command("fold", surgery, "-o", tmp_path / "out", "--verify")
    assert code == 0, errors
    out = tmp_path / "out"
    text = ["a fold is a change of weights", "and nothing else"]
    batch = AutoTokenizer.from_pretrained(out)(text, padding=True, return_tensors="pt")
    theirs = AutoTokenizer.from_pretrained(minilm())(text, padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], theirs["input_ids"])
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(out).eval()(**batch).last_hidden_state
    original = AutoModel.from_pretrained(minilm())
    wanted = expected(original, ps.load(surgery), dict(batch))
    torch.testing.assert_close(hidden, wanted, atol=1e-5, rtol=1e-5)
    assert (out / "1_Pooling" / "config.json").is_file()
    assert (out / "README.md").exists() == (Path(minilm()) / "README.md").exists()


def test_weights_of_other_formats_are_left_behind_and_those_of_a_pipeline_are_not(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for name, content in files_of(llama[0]).items():
        (base / name).write_bytes(content)
    for name in ("pytorch_model.bin", "onnx/model.onnx", "2_Dense/model.safetensors", "merges.txt"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("x")
    (base / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Dense"}]))
    (base / ".hidden").write_text("x")
    result = ps.fold_to_directory(llama[1], tmp_path / "out", base=str(base))
    assert result.copied == ("2_Dense/", "merges.txt", "modules.json")


def test_files_are_as_readable_as_others(llama: tuple[Path, Path], tmp_path: Path) -> None:
    ps.fold_to_directory(llama[1], tmp_path / "out")
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir()}
    (tmp_path / "plain").write_text("x")
    assert modes == {stat.S_IMODE((tmp_path / "plain").stat().st_mode)}


def test_a_plain_module_gives_its_state_dict(tmp_path: Path) -> None:
    operated = randomise(ps.apply(captured("functional"), "lora_qv"), scale=0.05)
    operated.save(tmp_path / "surgery")
    out = tmp_path / "out"
    ps.fold_to_directory(tmp_path / "surgery", out, base=captured("functional"), verify=True)
    module = ZOO["functional"].build()
    module.load_state_dict(load_file(out / "model.safetensors"))
    inputs = ZOO["functional"].inputs(3, 6)
    with torch.no_grad():
        expected = operated(**inputs)
        apart = (module(**inputs) - expected).abs().max()
    assert apart <= 1e-6 * max(1.0, expected.abs().max())  # what fp32 can tell apart


WRONG = """
name: wrong
rules:
  - match: linear
    where: {role: attn.q}
    params: {B: {shape: [out, in], init: normal(0.1)}}
    rewrite: y + linear(x, B)
    fold: W + 2 * B
"""


def test_a_fold_that_is_not_the_rewrite_is_found_out(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    ps.apply(ps.capture(str(llama[0])), ps.parse_rules(WRONG)).save(tmp_path / "surgery")
    before = files_of(tmp_path)
    code, out, _ = command(
        "fold", tmp_path / "surgery", "-o", tmp_path / "out", "--verify", "--json"
    )
    assert code == 4
    assert json.loads(out)["error"]["code"] == "PSG410"
    assert files_of(tmp_path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["surgery"]


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 3)]
)
def test_nothing_is_left_of_a_fold_that_stops_midway(
    error: BaseException,
    code: int,
    llama: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*arguments: Any) -> Any:
        assert any(tmp_path.rglob("model.safetensors"))  # so there is something to be left
        raise error

    monkeypatch.setattr(pretrained, "copy_missing", stop)
    before = files_of(llama[0]) | files_of(llama[1])
    in_memory = ("--class", "LlamaForCausalLM")
    assert command("fold", llama[1], "-o", tmp_path / "out", *in_memory)[0] == code
    assert list(tmp_path.iterdir()) == []
    assert files_of(llama[0]) | files_of(llama[1]) == before


def test_outputs_that_exist_or_touch_an_input_are_refused(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    before = files_of(llama[1])
    code, _, errors = command("fold", llama[1], "-o", llama[1] / "out")
    assert (code, "PSG602" in errors) == (3, True)
    (tmp_path / "out").mkdir()
    code, _, errors = command("fold", llama[1], "-o", tmp_path / "out")
    assert (code, "PSG601" in errors) == (3, True)
    code, _, errors = command(
        "fold", llama[1], "-o", tmp_path / "new", "--onnx", llama[1] / "model.onnx"
    )
    assert (code, "PSG602" in errors) == (3, True)
    assert files_of(llama[1]) == before
    assert not (tmp_path / "new").exists()


def test_a_directory_that_is_no_adapter_is_named(llama: tuple[Path, Path], tmp_path: Path) -> None:
    code, _, errors = command("fold", llama[0], "-o", tmp_path / "out")
    assert (code, "PSG607" in errors) == (3, True)
    assert "holds neither a surgery nor a peft adapter" in errors


def test_tensors_that_base_and_class_do_not_share_are_named(tmp_path: Path) -> None:
    ZOO["bert"].build().save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    config["architectures"] = ["BertModel"]
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    ps.apply(ps.capture(str(tmp_path / "base")), "lora_qv").save(tmp_path / "surgery")
    result = ps.fold_to_directory(tmp_path / "surgery", tmp_path / "folded")
    assert len(result.notes) == 1
    assert "tensors in" in result.notes[0]
    assert "'classifier.bias' first" in result.notes[0]


def test_a_fold_that_changes_no_weight_does_not_claim_to_know_why() -> None:
    """What was trained may be too small for the dtype of the weights, as well as untrained."""
    nothing = FoldReport(Path("out"), {}, 5, adapters=("a",))
    assert "changes no weight at this precision" in str(nothing)
    assert "untrained, or too small" in str(nothing)
