"""What is captured is exactly the original: outputs, their type, gradients, names."""

from __future__ import annotations

import pytest
import torch

from tests.capture.pairs import Pair, assert_same, assert_same_gradients, dropping_llama, pair
from tests.models.zoo import ZOO, ids

TEXT = (
    "bert",
    "roberta",
    "gpt2",
    "opt",
    "llama",
    "qwen3",
    "gemma3",
    "phi3",
    "falcon_7b",
    "falcon_1b",
    "gpt_neox",
    "bloom",
    "mixtral",
    "t5",
    "bart",
    "deberta",
)
IMAGES = ("vit", "resnet", "swin")
MODULES = ("transformer_encoder", "functional", "preceded")


@pytest.mark.parametrize("name", [*TEXT, *IMAGES, *MODULES])
def test_outputs_are_the_originals_at_unseen_shapes(name: str) -> None:
    both = pair(name)
    for batch, seq in ((3, 5), (2, 13), (4, 9)):
        inputs = ZOO[name].inputs(batch, seq)
        if "attention_mask" in inputs:
            inputs["attention_mask"][0, -2:] = 0
        assert_same(*both.run(**inputs))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "gemma3", "t5", "vit", "functional"])
def test_a_batch_of_one_needs_no_capture_of_its_own(name: str) -> None:
    both = pair(name)
    assert_same(*both.run(**ZOO[name].inputs(1, 6)))
    assert len(both.graph.captures) == 1


@pytest.mark.parametrize("name", ["gpt2", "llama", "functional", "transformer_encoder"])
def test_a_sequence_of_one_is_exact(name: str) -> None:
    both = pair(name)
    for batch in (1, 3):
        assert_same(*both.run(**ZOO[name].inputs(batch, 1)))


@pytest.mark.parametrize("name", [*TEXT, *IMAGES, *MODULES])
def test_state_dict_names_are_the_originals(name: str) -> None:
    both = pair(name)
    assert list(both.graph.state_dict()) == list(both.original.state_dict())
    assert [n for n, _ in both.graph.named_parameters()] == [
        n for n, _ in both.original.named_parameters()
    ]
    assert [n for n, _ in both.graph.named_modules()] == [
        n for n, _ in both.original.named_modules()
    ]


def labelled(name: str) -> Pair:
    return dropping_llama() if name == "llama" else pair(name)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "opt", "bart", "t5"])
def test_loss_and_gradients_in_training_are_the_originals_under_one_seed(name: str) -> None:
    both = labelled(name)
    inputs = ZOO[name].inputs(3, 6)
    labels = torch.tensor([0, 1, 1]) if name == "bert" else ids(3, 6)
    if name == "bart":
        del inputs["decoder_input_ids"]  # made of the labels
    if name == "t5":
        labels = ids(3, 7)
    both.train()
    expected, actual = both.run(**inputs, labels=labels)
    assert_same(expected, actual)
    expected.loss.backward()
    actual.loss.backward()
    assert_same_gradients(both)
    assert not torch.equal(both.run(**inputs, labels=labels, seed=1)[1].loss, actual.loss)


def test_an_image_models_gradients_are_the_originals() -> None:
    both = pair("resnet")
    both.train()
    expected, actual = both.run(**ZOO["resnet"].inputs(3, 0))
    expected.logits.square().sum().backward()
    actual.logits.square().sum().backward()
    assert_same_gradients(both)


def test_state_can_be_loaded_from_the_original() -> None:
    both = pair("bert")
    with torch.no_grad():
        for parameter in both.original.parameters():
            parameter.mul_(1.5)
    both.graph.load_state_dict(both.original.state_dict())
    assert_same(*both.run(**ZOO["bert"].inputs(2, 4)))
