"""train() and eval() reach everything that behaves differently in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftsurgery.capture import capture
from peftsurgery.errors import SurgeryError
from tests.capture.pairs import assert_same, dropping_llama, pair, pair_of
from tests.models.zoo import ZOO, hf, text


def test_attentions_own_dropout_follows_train_and_eval() -> None:
    both = dropping_llama()
    inputs = text(2, 6)
    both.train(False)
    assert_same(*both.run(**inputs))
    assert torch.equal(both.run(**inputs, seed=1)[1].logits, both.run(**inputs, seed=2)[1].logits)
    both.train()
    assert_same(*both.run(**inputs))
    assert not torch.equal(
        both.run(**inputs, seed=1)[1].logits, both.run(**inputs, seed=2)[1].logits
    )


def test_a_submodule_in_eval_mode_stays_in_eval_mode() -> None:
    both = dropping_llama()
    both.train()
    for model in (both.original, both.graph):
        model.get_submodule("model.layers.0").eval()
    assert_same(*both.run(**text(2, 6)))
    for model in (both.original, both.graph):
        model.get_submodule("model.layers.1.self_attn").eval()
    torch.manual_seed(3)
    still = both.graph(**text(2, 6)).logits
    torch.manual_seed(4)
    assert torch.equal(both.graph(**text(2, 6)).logits, still)


def test_a_model_captured_in_eval_mode_drops_in_train_mode() -> None:
    both = pair("bert")
    both.train()
    assert_same(*both.run(**ZOO["bert"].inputs(2, 6)))


def test_batch_norms_update_their_statistics_as_the_original_does() -> None:
    both = pair("resnet")
    both.train()
    for batch in (3, 2):
        assert_same(*both.run(**ZOO["resnet"].inputs(batch, 0)))
    found = dict(both.graph.named_buffers())
    for name, buffer in both.original.named_buffers():
        assert torch.equal(found[name], buffer), name
    both.train(False)
    assert_same(*both.run(**ZOO["resnet"].inputs(4, 0)))
    assert all(torch.equal(found[name], buffer) for name, buffer in both.original.named_buffers())


def test_a_frozen_batch_norm_keeps_its_statistics() -> None:
    both = pair("resnet")
    both.train()
    name = "resnet.encoder.stages.0.layers.0"
    for model in (both.original, both.graph):
        model.get_submodule(name).eval()
    before = {n: b.clone() for n, b in both.graph.get_submodule(name).named_buffers()}
    assert_same(*both.run(**ZOO["resnet"].inputs(3, 0)))
    for n, buffer in both.graph.get_submodule(name).named_buffers():
        assert torch.equal(buffer, before[n])


def test_training_a_captured_model_leaves_the_originals_statistics_alone() -> None:
    module = ZOO["resnet"].build()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    graph = capture(module).train()
    graph(**ZOO["resnet"].inputs(3, 0))
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())


def test_randomness_without_a_train_flag_is_captured_once_for_each_mode() -> None:
    torch.manual_seed(0)
    make = hf(
        "SwinForImageClassification",
        "SwinConfig",
        image_size=16,
        patch_size=4,
        embed_dim=16,
        depths=[2],
        num_heads=[2],
        window_size=2,
        drop_path_rate=0.5,
    )
    both = pair_of(make().eval(), None)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, 16, 16, generator=generator)
    assert both.graph.captures[0].mode is False
    assert_same(*both.run(pixel_values=images))
    both.train()
    assert_same(*both.run(pixel_values=images))
    assert [c.mode for c in both.graph.captures] == [False, True]
    both.train(False)
    assert_same(*both.run(pixel_values=images))
    assert len(both.graph.captures) == 2


class AlwaysDropping(nn.Module):
    """Monte Carlo dropout: it drops in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(F.dropout(self.into(x), 0.5, training=True))


@pytest.mark.parametrize("train", [True, False])
def test_dropout_that_ignores_the_mode_goes_on_ignoring_it(train: bool) -> None:
    both = pair_of(AlwaysDropping(), {"x": torch.randn(2, 4)})
    both.train(train)
    assert_same(*both.run(torch.ones(5, 4)))


class LayerDropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.training and torch.rand(()).item() < 0.5:
                continue
            x = layer(x)
        return x


def test_a_model_that_decides_at_random_in_training_is_refused_there_only() -> None:
    both = pair_of(LayerDropped().eval(), {"x": torch.randn(2, 4)})
    assert_same(*both.run(torch.randn(3, 4)))
    with pytest.raises(SurgeryError) as caught:
        both.graph.train()(torch.randn(3, 4))
    assert caught.value.code == "PSG211"


class FrozenNorm(nn.Module):
    """Its batch norm stays in eval mode, whatever train() says."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def test_a_model_that_keeps_a_part_in_eval_mode_still_does() -> None:
    both = pair_of(FrozenNorm(), {"x": torch.randn(3, 4)})
    both.train()
    assert_same(*both.run(torch.randn(5, 4)))
    assert torch.equal(both.graph.get_buffer("norm.running_mean"), torch.zeros(4))
