"""The class that a base is read as: the one that the adapter was trained on.

The base is the directory of a causal language model; the oracle is peft's merge_and_unload on the
class that the adapter was made of, and transformers' own class for the task reads what is written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import peftsurgery as ps
from peftsurgery.cli.root import root
from peftsurgery.errors import SurgeryError
from peftsurgery.formats.pretrained import fold_to_directory, open_adapter
from peftsurgery.quiet import quiet

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = torch.tensor([[1, 2, 4, 12, 5], [3, 11, 7, 8, 9]])

# For each task the class that transformers has for it, and how many labels were trained.
TASKS: dict[str, tuple[str, str, int | None]] = {
    "SEQ_CLS": ("LlamaForSequenceClassification", "AutoModelForSequenceClassification", 3),
    "TOKEN_CLS": ("LlamaForTokenClassification", "AutoModelForTokenClassification", 5),
    "QUESTION_ANS": ("OPTForQuestionAnswering", "AutoModelForQuestionAnswering", None),
    "FEATURE_EXTRACTION": ("LlamaModel", "AutoModel", None),
}


SIZES: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a causal language model."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=24)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one, whose class for questions has its names: Llama's has others."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("opt")
    config = OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16, dropout=0.0)
    OPTForCausalLM(config).save_pretrained(folder)
    return folder


def trained(base: Path, folder: Path, task: str, **options: Any) -> Tensor:
    """An adapter of a task with values that show; what peft computes once it has merged it."""
    kind, _, labels = TASKS[task]
    torch.manual_seed(1)
    heads = {} if labels is None else {"num_labels": labels}
    with quiet():
        model = getattr(transformers, kind).from_pretrained(base, **heads)
    settings = {"task_type": task, "target_modules": ["q_proj", "v_proj"], **options}
    theirs = get_peft_model(model, LoraConfig(r=2, **settings))
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(folder)
    assert isinstance(theirs, PeftModel)
    return first(theirs.merge_and_unload().eval())


@torch.no_grad()
def first(model: Any) -> Tensor:
    result: Tensor = model(input_ids=TOKENS)[0]
    return result


@pytest.mark.parametrize("task", TASKS)
def test_the_class_of_a_fold_is_that_of_the_adapters_task(
    task: str, base: Path, opt: Path, tmp_path: Path
) -> None:
    kind, auto, labels = TASKS[task]
    stored = opt if kind.startswith("OPT") else base
    wanted = trained(stored, tmp_path / "adapter", task)
    result = fold_to_directory(tmp_path / "adapter", tmp_path / "folded", base=str(stored))
    again = getattr(transformers, auto).from_pretrained(tmp_path / "folded").eval()
    assert type(again).__name__ == kind
    torch.testing.assert_close(first(again), wanted, rtol=0, atol=1e-6)
    assert f"the base is built as a {kind}" in result.notes
    record = json.loads((tmp_path / "folded/peftsurgery.json").read_text())
    said = {"kind": kind} | ({} if labels is None else {"labels": labels})
    assert [entry["build"] for entry in record["folded"]] == [said] * len(record["folded"])
    if labels is not None:
        assert again.config.num_labels == labels
        assert f"the base is built with {labels} labels" in result.notes


def test_without_a_task_the_class_is_the_one_that_peft_noted(base: Path, tmp_path: Path) -> None:
    """And a surgery that is saved remembers it, with its labels."""
    wanted = trained(
        base, tmp_path / "adapter", "SEQ_CLS", task_type=None, modules_to_save=["score"]
    )
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["auto_mapping"]["base_model_class"] == "LlamaForSequenceClassification"
    operated = open_adapter(tmp_path / "adapter", str(base)).eval()
    torch.testing.assert_close(first(operated), wanted, rtol=0, atol=1e-6)
    operated.save(tmp_path / "surgery")
    again = ps.load(tmp_path / "surgery").eval()
    assert torch.equal(first(again), first(operated))


def test_where_the_names_fit_the_base_itself_the_task_does_not_count(
    base: Path, tmp_path: Path
) -> None:
    """Many name FEATURE_EXTRACTION, or a task by mistake, for what is on another class."""
    model = LlamaForCausalLM.from_pretrained(base)
    theirs = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    said = json.loads(file.read_text()) | {"task_type": "FEATURE_EXTRACTION", "auto_mapping": None}
    file.write_text(json.dumps(said))
    operated = open_adapter(tmp_path, str(base))
    assert type(operated.source.module) is LlamaForCausalLM


@pytest.mark.parametrize(
    ("kind", "refusal"),
    [
        ("LlamaForTokenClassification", "PSG515: 'score.bias' of a LlamaForTokenClassification"),
        ("LlamaForTokenClassifcation", r"PSG218: .*\n.*'LlamaForTokenClassification'"),
        ("BertForSequenceClassification", "PSG218: .* not made of the config of a 'llama'"),
        ("AutoModel", "PSG218: transformers has no model class 'AutoModel'"),
    ],
)
def test_a_class_by_name_overrides_and_must_have_all_its_values(
    kind: str, refusal: str, base: Path, tmp_path: Path
) -> None:
    trained(base, tmp_path / "adapter", "SEQ_CLS")
    with pytest.raises(SurgeryError, match=refusal):
        fold_to_directory(tmp_path / "adapter", tmp_path / "out", base=str(base), kind=kind)
    assert not (tmp_path / "out").exists()


def test_the_command_line_overrides_the_class(base: Path, tmp_path: Path) -> None:
    wanted = trained(
        base, tmp_path / "adapter", "SEQ_CLS", task_type=None, modules_to_save=["score"]
    )
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_mapping": None}))
    arguments = [
        "fold",
        str(tmp_path / "adapter"),
        "--base",
        str(base),
        "-o",
        str(tmp_path / "out"),
    ]
    # no class is said, and the base's own has no such head
    assert CliRunner().invoke(root, arguments).exit_code == 3
    assert CliRunner().invoke(root, [*arguments, "--class", TASKS["SEQ_CLS"][0]]).exit_code == 0
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(first(again), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("task", ["SEQ_CLS", "FEATURE_EXTRACTION"])
def test_what_is_written_for_peft_says_its_class_and_folds_again(
    task: str, base: Path, tmp_path: Path
) -> None:
    kind, auto, _ = TASKS[task]
    wanted = trained(base, tmp_path / "adapter", task)
    ours = open_adapter(tmp_path / "adapter", str(base))
    ps.to_peft(ours, tmp_path / "ours")
    fold_to_directory(tmp_path / "ours", tmp_path / "folded")
    again = getattr(transformers, auto).from_pretrained(tmp_path / "folded").eval()
    assert type(again).__name__ == kind
    torch.testing.assert_close(first(again), wanted, rtol=0, atol=1e-6)
    with quiet():
        theirs = getattr(transformers, kind).from_pretrained(
            base, num_labels=again.config.num_labels
        )
    read = PeftModel.from_pretrained(theirs, tmp_path / "ours")
    torch.testing.assert_close(first(read.eval()), wanted, rtol=0, atol=1e-6)


def test_a_base_that_is_captured_keeps_its_class(base: Path, tmp_path: Path) -> None:
    graph, kind = ps.capture(str(base)), "LlamaForSequenceClassification"
    ps.apply(graph, "lora_qv").save(tmp_path / "surgery")
    ps.to_peft(ps.apply(graph, "lora_qv"), tmp_path / "adapter")
    for spec in (tmp_path / "surgery", tmp_path / "adapter"):
        with pytest.raises(SurgeryError, match=r"PSG218: .* is a LlamaForCausalLM"):
            fold_to_directory(spec, tmp_path / "out", base=graph, kind=kind)
        assert not (tmp_path / "out").exists()
    own = fold_to_directory(tmp_path / "surgery", tmp_path / "out", graph, kind="LlamaForCausalLM")
    assert own.adapters == ("lora_qv",)
