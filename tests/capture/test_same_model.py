"""Models of the same files are captured once in a process, and again if anything is otherwise."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, BertConfig, BertForSequenceClassification
from transformers.integrations import sdpa_attention
from transformers.models.bert import modeling_bert

import peftsurgery as ps
from peftsurgery.capture.captures import Captures

IDS = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])
CALL = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}  # what is captured first


@pytest.fixture
def directory(tmp_path: Path) -> str:
    """A small BERT's files."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = BertConfig(num_hidden_layers=3, vocab_size=20, num_labels=2, **sizes)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes of the models that are captured, one entry a capture."""
    found: list[str] = []
    original = Captures._capture

    def capture(self: Captures, module: nn.Module, *args: Any) -> Any:
        found.append(type(module).__name__)
        return original(self, module, *args)

    monkeypatch.setattr(Captures, "_capture", capture)
    return found


def test_capture_apply_load_and_fold_capture_once(
    directory: str, made: list[str], tmp_path: Path
) -> None:
    operated = ps.apply(ps.capture(directory), "lora_qv")
    operated.save(tmp_path / "surgery")
    loaded = ps.load(tmp_path / "surgery")
    ps.fold_to_directory(tmp_path / "surgery", tmp_path / "folded", verify=True)
    ps.fold_to_directory(tmp_path / "surgery", tmp_path / "again", verify=True)
    assert len(made) == 1
    expected = BertForSequenceClassification.from_pretrained(directory).eval()(**CALL).logits
    torch.testing.assert_close(loaded.eval()(**CALL).logits, expected)


@pytest.mark.slow
def test_later_captures_of_each_are_its_own(directory: str, made: list[str]) -> None:
    one, two = ps.capture(directory), ps.capture(directory)
    model = BertForSequenceClassification.from_pretrained(directory).eval()
    labels = torch.tensor([0, 1])
    for graph in (two, one):
        graph.eval()
        expected = model(**CALL, labels=labels)
        torch.testing.assert_close(graph(**CALL, labels=labels).loss, expected.loss)
        names = [p.label for c in graph.captures for found in c.programs.values() for p in found]
        structures = {id(p) for c in graph.captures for ps_ in c.programs.values() for p in ps_}
        assert len(set(names)) == len(structures)
    assert len(made) == 3


@pytest.mark.slow
def test_what_is_gone_is_captured_again(directory: str, made: list[str]) -> None:
    graph = ps.capture(directory)
    del graph
    gc.collect()
    ps.capture(directory)
    assert len(made) == 2


@contextmanager
def _other_forward() -> Iterator[None]:
    original = modeling_bert.BertOutput.forward

    def forward(self: Any, hidden_states: Any, input_tensor: Any) -> Any:
        return original(self, 2 * hidden_states, input_tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_bert.BertOutput, "forward", forward)
        yield


@contextmanager
def _other_code() -> Iterator[None]:
    original = modeling_bert.BertPooler.forward
    before = original.__code__
    original.__code__ = (lambda self, hidden_states: hidden_states[:, 0]).__code__
    try:
        yield
    finally:
        original.__code__ = before


@contextmanager
def _other_attention() -> Iterator[None]:
    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **others: Any) -> Any:
        found, weights = sdpa_attention.sdpa_attention_forward(
            module, query, key, value, mask, **others
        )
        return -found, weights

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AttentionInterface._global_mapping, "sdpa", attend)
        yield


@pytest.mark.slow
@pytest.mark.parametrize("changed", [_other_forward, _other_code, _other_attention])
def test_code_that_is_otherwise_is_captured_again(
    directory: str, made: list[str], changed: Callable[[], AbstractContextManager[None]]
) -> None:
    before = ps.capture(directory).eval()
    plain = before(**CALL).logits
    with changed():
        other = ps.capture(directory).eval()
        expected = BertForSequenceClassification.from_pretrained(directory).eval()(**CALL).logits
    torch.testing.assert_close(other(**CALL).logits, expected)
    assert not torch.allclose(expected, plain)
    again = ps.capture(directory).eval()
    torch.testing.assert_close(again(**CALL).logits, plain)
    assert len(made) == 3


def test_a_function_of_torch_that_is_otherwise_is_captured_again(
    directory: str, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = ps.capture(directory)
    original = nn.functional.layer_norm

    def layer_norm(*args: Any, **kwargs: Any) -> Any:
        return 3 * original(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "layer_norm", layer_norm)
    ps.capture(directory)
    assert len(made) == 2
    assert graph.base_capture.top.graph


def test_a_config_that_is_otherwise_is_captured_again(directory: str, made: list[str]) -> None:
    before = ps.capture(directory)
    file = Path(directory, "config.json")
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "hidden_act": "relu"}), encoding="utf-8")
    other = ps.capture(directory).eval()
    assert len(made) == 2
    expected = BertForSequenceClassification.from_pretrained(directory).eval()(**CALL).logits
    torch.testing.assert_close(other(**CALL).logits, expected)
    assert not torch.allclose(before.eval()(**CALL).logits, expected)


def test_weights_that_are_otherwise_are_read_by_each(directory: str, made: list[str]) -> None:
    before = ps.capture(directory).eval()
    first = before(**CALL).logits
    model = BertForSequenceClassification.from_pretrained(directory)
    with torch.no_grad():
        model.classifier.weight.add_(1)
    model.save_pretrained(directory)
    after = ps.capture(directory).eval()(**CALL).logits
    torch.testing.assert_close(after, model.eval()(**CALL).logits)
    torch.testing.assert_close(before(**CALL).logits, first)
    assert len(made) == 1
