"""made_by: what a factory may return, and what is refused."""

from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

import peftsurgery as ps


class Scaled(nn.Module):
    """A module of no class that has example inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * scale[:, None]


X, SCALE = torch.zeros(2, 6), torch.zeros(2)
BERT = BertConfig(
    vocab_size=9,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=8,
    max_position_embeddings=16,
)
WELL: dict[str, Callable[[], Any]] = {
    "by_name": lambda: (Scaled(), {"x": X, "scale": SCALE}),
    "by_position": lambda: (Scaled(), (X, SCALE)),
    "any_mapping": lambda: (Scaled(), UserDict(x=X, scale=SCALE)),
    "one_row": lambda: (Scaled(), (X[:1], SCALE[:1])),
}


@pytest.fixture
def factory(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], str]:
    def named(function: Callable[..., Any]) -> str:
        monkeypatch.setitem(globals(), "made_here", function)
        return f"{__name__}:made_here"

    return named


@pytest.mark.parametrize("name", WELL)
def test_a_module_with_inputs_is_captured_and_called_like_it(factory: Any, name: str) -> None:
    graph = ps.capture(factory(WELL[name]))
    x, scale = torch.randn(7, 6), torch.randn(7)
    original = Scaled()
    original.load_state_dict(graph.state_dict())
    for outputs in (graph(x, scale), graph(scale=scale, x=x)):
        torch.testing.assert_close(outputs, original(x, scale), rtol=0, atol=0)


def test_inputs_that_are_given_come_before_those_of_the_factory(factory: Any) -> None:
    graph = ps.capture(factory(WELL["by_name"]), inputs=(X, SCALE.long()))
    assert graph.base_capture.call.tensors["scale"].dtype == torch.long


def test_a_model_of_transformers_may_come_with_inputs_of_another_kind(factory: Any) -> None:
    embeddings = {"inputs_embeds": torch.zeros(2, 5, 8)}
    graph = ps.capture(factory(lambda: (BertModel(BERT).eval(), embeddings)))
    assert graph.base_capture.names == ("inputs_embeds",)
    assert "input_ids" in ps.capture(factory(lambda: BertModel(BERT).eval())).base_capture.names


def test_the_same_random_weights_and_inputs_are_made_each_time(factory: Any) -> None:
    spec = factory(lambda: (Scaled(), (torch.randn(2, 6), torch.randn(2))))
    state, again = torch.get_rng_state(), [ps.capture(spec).state_dict() for _ in range(2)]
    assert torch.equal(again[0]["inner.weight"], again[1]["inner.weight"])
    assert torch.equal(state, torch.get_rng_state())


def lookup() -> nn.Module:
    parts: dict[str, nn.Module] = {}
    return parts["unet"]


ILL: dict[str, tuple[Callable[..., Any], str]] = {
    "nothing": (lambda: None, "made None, not an nn.Module"),
    "a class": (lambda: Scaled, "made a type"),
    "a list": (lambda: [Scaled(), (X,)], "made a list"),
    "inputs first": (lambda: ((X,), Scaled()), r"a tuple of \(tuple, Scaled\)"),
    "three things": (lambda: (Scaled(), (X,), {}), r"a tuple of \(Scaled, tuple, dict\)"),
    "one thing": (lambda: (Scaled(),), r"a tuple of \(Scaled\)"),
    "a class and inputs": (lambda: (Scaled, (X,)), r"a tuple of \(type, tuple\)"),
    "a bare tensor": (lambda: (Scaled(), X), r"(?s)a Tensor for inputs.*\(x,\)"),
    "a list of inputs": (lambda: (Scaled(), [X]), "(?s)a list for inputs.*a tuple or a dict"),
    "no inputs": (lambda: (Scaled(), None), "None for inputs"),
    "names that are none": (lambda: (Scaled(), {0: X}), "the name 0"),
    "arguments": (lambda size: Scaled(), "(?s)called without arguments.*'size'"),
    "a failure": (lookup, r"(?s)test_factories.py:\d+: .*KeyError: 'unet'"),
}


@pytest.mark.parametrize("name", ILL)
def test_ill_shaped_answers_and_failures_are_refused_by_name(factory: Any, name: str) -> None:
    function, words = ILL[name]
    with pytest.raises(ps.SurgeryError, match=words) as caught:
        ps.capture(factory(function))
    assert caught.value.code == "PSG205"


MISFITS: dict[str, tuple[Any, str]] = {
    "none at all": ((), "PSG203"),
    "a name too many": ({"x": X, "scale": SCALE, "sclae": SCALE}, "PSG203"),
    "no tensor": ((1, 2), "PSG203"),
    "another width": ((torch.zeros(2, 7), SCALE), "PSG201"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_inputs_that_the_module_does_not_take_are_refused(factory: Any, name: str) -> None:
    inputs, code = MISFITS[name]
    with pytest.raises(ps.SurgeryError) as caught:
        ps.capture(factory(lambda: (Scaled(), inputs)))
    assert caught.value.code == code


def test_a_module_without_inputs_is_told_how_to_come_with_them(factory: Any) -> None:
    spec = factory(Scaled)
    with pytest.raises(ps.SurgeryError, match=r"PSG202(.|\n)*return \(module, inputs\)"):
        ps.capture(spec)


def test_a_file_in_this_directory_is_said_to_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_own_unet.py").write_text("def made(): ...")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ps.SurgeryError, match=r"PSG205(.|\n)*PYTHONPATH=\."):
        ps.capture("my_own_unet:made")
    with pytest.raises(ps.SurgeryError, match="PSG205") as caught:
        ps.capture("nobodys_unet:made")
    assert caught.value.hint is None


@pytest.mark.parametrize("text", ["import no_such_package", "1 / 0", "def (:", "unknown"])
def test_a_file_that_cannot_be_imported_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (tmp_path / "broken_unet.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ps.SurgeryError, match="PSG205"):
        ps.capture("broken_unet:made")
