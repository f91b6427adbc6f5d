"""An operated model: called, trained, copied, cast and exported as the original is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import peftsurgery as ps
from tests.models.captured import captured
from tests.models.zoo import ZOO
from tests.surgery.reference import outputs, randomise


def test_the_base_is_untouched_and_its_memory_shared() -> None:
    graph = captured("llama")
    before = {name: value.clone() for name, value in graph.state_dict().items()}
    operated = randomise(ps.apply(graph, "lora_qv"))
    loss = operated(**ZOO["llama"].inputs(2, 5))[0].square().mean()
    loss.backward()
    assert all(p.requires_grad and p.grad is None for p in graph.parameters())
    for name, value in graph.state_dict().items():
        assert torch.equal(value, before[name])
        assert operated.get_parameter(name).data_ptr() == value.data_ptr()
    trained = {name for name, p in operated.named_parameters() if p.requires_grad}
    assert trained == set(operated.learnt())
    assert all(operated.get_parameter(name).grad is not None for name in trained)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_labels_given_later_use_the_same_parameters(name: str) -> None:
    operated = randomise(ps.apply(captured(name), "lora_qv", rank=3, alpha=6))
    batch = ZOO[name].inputs(2, 6)
    loss = operated(**batch, labels=batch["input_ids"]).loss
    logits = operated(**batch).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten()
    )
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(value.grad is not None for value in operated.learnt().values())


def test_dropout_acts_in_training_only() -> None:
    operated = randomise(ps.apply(captured("llama"), "lora_qv", dropout=0.5))
    batch = ZOO["llama"].inputs(2, 5)
    still = [operated.eval()(**batch).logits for _ in range(2)]
    assert torch.equal(*still)
    moving = [operated.train()(**batch).logits for _ in range(2)]
    assert not torch.equal(*moving)
    operated.eval()


def test_a_copy_is_independent() -> None:
    operated = randomise(ps.apply(captured("bert"), "lora_qv"))
    before = outputs(operated, "bert")
    twin = randomise(copy.deepcopy(operated), seed=5)
    assert not torch.equal(outputs(twin, "bert"), before)
    assert torch.equal(outputs(operated, "bert"), before)


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    grads = []
    for enabled in (False, True):
        torch.manual_seed(0)
        operated = randomise(ps.apply(captured("llama"), "lora_qv")).train()
        operated.gradient_checkpointing(enabled)
        operated(**ZOO["llama"].inputs(2, 5)).logits.square().mean().backward()
        grads.append([value.grad for value in operated.learnt().values()])
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)


def test_a_model_is_cast_with_its_adapters_and_computes_them_in_fp32() -> None:
    original = ZOO["llama"].build().to(torch.bfloat16)
    operated = randomise(ps.apply(captured("llama"), "lora_qv")).to(torch.bfloat16)

    def add(A: torch.Tensor, B: torch.Tensor) -> Any:
        def hook(part: torch.nn.Module, args: tuple[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
            wide = y.float() + 2.0 * (args[0].float() @ A.float().T @ B.float().T)
            return wide.to(torch.bfloat16)

        return hook

    for match in operated.report.matches:
        A, B = (operated.get_parameter(name).detach() for name in match["added"])
        assert A.dtype == torch.bfloat16
        original.get_submodule(match["module"]).register_forward_hook(add(A, B))
    assert torch.equal(outputs(operated, "llama"), outputs(original, "llama"))


def test_a_model_that_torch_exported_is_the_model_it_was() -> None:
    operated = randomise(ps.apply(captured("bert"), "lora_qv"))
    expected = outputs(operated, "bert")
    exported = torch.export.export(operated, (), kwargs=ZOO["bert"].inputs(3, 5))
    torch.testing.assert_close(outputs(exported.module(), "bert"), expected, rtol=0, atol=1e-6)
    assert torch.equal(outputs(copy.deepcopy(operated), "bert"), expected)
    assert outputs(operated.to(torch.bfloat16), "bert").dtype == torch.bfloat16


def test_a_part_in_another_mode_stays_in_it() -> None:
    graph = ps.capture(ZOO["bert"].build()).train()
    graph.get_submodule("bert.encoder.layer.0").eval()
    operated = ps.apply(graph, "lora_qv")
    assert operated.training
    assert not operated.get_submodule("bert.encoder.layer.0").training
    assert operated.get_submodule("bert.encoder.layer.1").training
