"""Models from directories and factories: weights when they are needed, and coded errors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, T5ForConditionalGeneration

from peftsurgery.capture import capture, open_source
from peftsurgery.errors import SurgeryError
from tests.capture.pairs import assert_same
from tests.models.zoo import ZOO, text


def saved(name: str, directory: Path, change: Callable[[nn.Module], Any] | None = None) -> Path:
    """A model of the zoo, saved by transformers."""
    model = ZOO[name].build()
    assert isinstance(model, PreTrainedModel)
    if change is not None:
        change(model)
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon_1b", "vit"])
def test_a_directory_is_captured_without_weights_and_runs_as_its_model(
    name: str, tmp_path: Path
) -> None:
    directory = saved(name, tmp_path / "model")
    (tmp_path / "model/model.safetensors").rename(tmp_path / "away.safetensors")
    graph = capture(str(directory))  # the weights are not even there
    assert all(parameter.is_meta for parameter in graph.parameters())
    (tmp_path / "away.safetensors").rename(directory / "model.safetensors")
    inputs = ZOO[name].inputs(3, 6)
    original = ZOO[name].build()
    assert_same(original(**inputs), graph(**inputs))
    assert list(graph.state_dict()) == list(original.state_dict())


def test_reading_weights_keeps_ties_and_the_parameters_an_optimizer_holds(tmp_path: Path) -> None:
    graph = capture(str(saved("gpt2", tmp_path)))
    optimizer = torch.optim.SGD(graph.parameters(), lr=0.1)
    before = list(graph.parameters())
    graph(**text(2, 4)).logits.square().mean().backward()
    assert [id(parameter) for parameter in graph.parameters()] == [id(p) for p in before]
    weight = graph.get_parameter("lm_head.weight")
    assert weight is graph.get_parameter("transformer.wte.weight")
    untrained = weight.detach().clone()
    optimizer.step()
    assert not torch.equal(weight, untrained)


def test_weights_that_files_hold_apart_are_apart_whatever_the_config_ties(tmp_path: Path) -> None:
    def untie(model: Any) -> None:
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))

    directory = saved("t5", tmp_path, untie)
    original = T5ForConditionalGeneration.from_pretrained(directory).eval()
    assert original.config.tie_word_embeddings
    assert original.lm_head.weight is not original.shared.weight
    graph, inputs = capture(str(directory)), ZOO["t5"].inputs(3, 6)
    assert_same(original(**inputs), graph(**inputs))
    tied = graph.get_parameter("encoder.embed_tokens.weight")
    assert tied is graph.get_parameter("shared.weight")


def test_a_bf16_checkpoint_stays_bf16(tmp_path: Path) -> None:
    saved("llama", tmp_path, lambda model: model.to(torch.bfloat16))
    graph = capture(str(tmp_path))
    original = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert {p.dtype for p in graph.parameters()} == {p.dtype for p in original.parameters()}
    inputs = text(2, 5)
    assert_same(original(**inputs), graph(**inputs))


def test_a_config_that_names_no_dtype_leaves_it_to_the_weights(tmp_path: Path) -> None:
    saved("llama", tmp_path, lambda model: model.to(torch.bfloat16))
    config = json.loads((tmp_path / "config.json").read_text())
    kept = {key: value for key, value in config.items() if "dtype" not in key}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    dtypes = {parameter.dtype for parameter in open_source(str(tmp_path)).module.parameters()}
    assert dtypes == {torch.bfloat16}


def test_a_directory_without_weights_is_refused_only_when_it_runs(tmp_path: Path) -> None:
    directory = saved("llama", tmp_path)
    (directory / "model.safetensors").unlink()
    graph = capture(str(directory))
    assert graph.captures[0].programs
    with pytest.raises(SurgeryError) as caught:
        graph(**text(2, 4))
    assert caught.value.code == "PSG207"


def test_damaged_weights_are_refused_when_they_are_read(tmp_path: Path) -> None:
    directory = saved("llama", tmp_path)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(SurgeryError) as caught:
        open_source(str(directory)).weights()
    assert caught.value.code == "PSG207"


class WithConstant(nn.Module):
    """A constant that is made on the device of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tensor([1.0, 2.0, 3.0], device=x.device)


def factory() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), WithConstant())


def not_a_module() -> int:
    return 3


def test_constants_have_values_in_captures_of_models_without_weights() -> None:
    with torch.device("meta"):
        graph = capture(factory(), {"input": torch.randn(2, 3)})
    constants = [value for name, value in graph.named_buffers() if "constant" in name]
    assert [value.tolist() for value in constants] == [[1.0, 2.0, 3.0]]
    with pytest.raises(SurgeryError) as caught:
        graph(torch.randn(2, 3))
    assert caught.value.code == "PSG207"


def test_a_factory_is_imported_and_called() -> None:
    source = open_source("tests.capture.test_sources:factory")
    assert isinstance(source.module, nn.Sequential)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("tests.capture.test_sources:factry", "did you mean 'factory'"),
        ("tests.capture.test_sources:not_a_module", "made a int"),
        ("tests.capture.no_such:factory", "no_such"),
        (":factory", "factory"),
        ("no/such/place", "no/such/place"),
        ("", "no model"),
        ("\0/\0/", "no model"),
        ("x" * 5000, "no model"),
    ],
)
def test_what_names_no_model_is_refused_by_name(spec: str, says: str) -> None:
    with pytest.raises(SurgeryError) as caught:
        open_source(spec)
    assert caught.value.code == "PSG205"
    assert says in str(caught.value)


def test_a_misspelt_directory_gets_a_suggestion(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "models/my_bert").mkdir(parents=True)
    (tmp_path / "models/my_bert/config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for spec in ("models/my_brt", f"{tmp_path}/models/my_brt"):
        with pytest.raises(SurgeryError, match="did you mean 'my_bert'") as caught:
            open_source(spec)
        assert caught.value.code == "PSG205"


CONFIGS: dict[str, tuple[str | bytes | None, str, str]] = {
    "missing": (None, "PSG205", "config.json"),
    "not JSON": ("{", "PSG205", "cannot be read"),
    "not UTF-8": (b"\xff\xfe{}", "PSG205", "cannot be read"),
    "nested too deep": ("[" * 100_000, "PSG205", "cannot be read"),
    "not an object": ("[]", "PSG205", "no JSON object"),
    "no model_type": ("{}", "PSG206", "names no model_type"),
    "unknown model_type": ('{"model_type": "lama"}', "PSG206", "did you mean 'llama'"),
    "model_type of a wrong type": ('{"model_type": 3}', "PSG206", "3"),
    "model_type is a list": ('{"model_type": [1]}', "PSG206", "model_type"),
    "remote code": (
        '{"model_type": "llama", "auto_map": {"AutoModel": "modeling_x.X"}}',
        "PSG208",
        "AutoModel",
    ),
    "a size that is a word": (
        '{"model_type": "llama", "hidden_size": "x"}',
        "PSG206",
        "hidden_size",
    ),
    "sizes that do not fit": (
        '{"model_type": "bert", "hidden_size": 10, "num_attention_heads": 3}',
        "PSG206",
        "BertModel",
    ),
    "a negative size": ('{"model_type": "bert", "vocab_size": -5}', "PSG206", ""),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_bad_config_is_refused(case: str, tmp_path: Path) -> None:
    content, code, says = CONFIGS[case]
    if content is not None:
        raw = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(SurgeryError) as caught:
        open_source(str(tmp_path))
    assert caught.value.code == code
    assert says in str(caught.value)


class ByValue(nn.Module):
    """Decides by values that its weights have a say in what to run."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.into(x) if self.into(x).sum() > 0 else x


@pytest.mark.parametrize("train", [True, False])
def test_control_flow_that_depends_on_values_is_refused(train: bool) -> None:
    with pytest.raises(SurgeryError, match="ByValue") as caught:
        capture(ByValue().train(train), {"x": torch.randn(2, 4)})
    assert caught.value.code == "PSG228"


def test_a_module_of_ones_own_needs_inputs() -> None:
    with pytest.raises(SurgeryError, match="inputs") as caught:
        capture(ByValue())
    assert caught.value.code == "PSG202"


@pytest.mark.parametrize("damage", ["twice", "hole", "fifo", "index"])
def test_weights_that_transformers_would_take_are_refused_if_they_lie(
    damage: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    ZOO["llama"].build().save_pretrained(folder)
    graph, file = capture(str(folder)), folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length].rstrip(), content[8 + length :]
    if damage == "twice":  # the last one of a name counts, for most readers
        name = next(name for name in json.loads(header) if name != "__metadata__")
        again = f',"{name}":{json.dumps(json.loads(header)[name])}}}'.encode()
        header = header[:-1] + again
        file.write_bytes(len(header).to_bytes(8, "little") + header + data)
    elif damage == "hole":
        file.write_bytes(length.to_bytes(8, "little") + content[8:] + b"more")
    elif damage == "fifo":
        file.unlink()
        os.mkfifo(file)
    else:
        where = {"a": file.name, "b": "../other.safetensors"}
        file.rename(folder / "model-1.safetensors")
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    with pytest.raises(SurgeryError, match="PSG207"):
        graph.bind()
