"""The mean over a sequence's tokens, where models keep the tokens elsewhere than on axis 1."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import peftsurgery as ps
from tests.models.captured import captured
from tests.models.zoo import ZOO
from tests.surgery.reference import randomise

MEAN = """
name: mean
rules:
  - match: linear
    where: {role: ffn.up}
    params: {A: {shape: [1, in], init: normal(1)}}
    rewrite: y + token_mean(linear(x, A))
"""


def encoder(batch_first: bool) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nested tensors are not used
        return nn.TransformerEncoder(layer, 2).eval()


def add_by_hand(
    module: nn.Module, ours: ps.OperatedModel, path: str, mean: Callable[[Tensor], Tensor]
) -> None:
    """Add to the output of a layer the mean of what its input and the parameter give."""
    A = ours.get_parameter(f"{path}.mean.A").detach()
    module.get_submodule(path).register_forward_hook(lambda part, args, y: y + mean(args[0] @ A.T))


def test_tokens_on_the_first_axis() -> None:
    module, x = encoder(batch_first=False), torch.randn(6, 3, 32)
    ours = ps.apply(ps.capture(module, (torch.randn(7, 2, 32),)), ps.parse_rules(MEAN))
    for index in range(2):
        add_by_hand(module, ours, f"layers.{index}.linear1", lambda v: v.mean(0, keepdim=True))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), module(x), rtol=0, atol=1e-6)


def test_tokens_on_one_axis_with_the_batch() -> None:
    module, inputs = ZOO["opt"].build(), ZOO["opt"].inputs(3, 6)
    ours = ps.apply(captured("opt"), ps.parse_rules(MEAN))
    for index in range(2):
        add_by_hand(
            module,
            ours,
            f"model.decoder.layers.{index}.fc1",
            lambda v: v.view(3, 6, 1).mean(1, keepdim=True).expand(3, 6, 1).reshape(18, 1),
        )
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs)[0], module(**inputs)[0], rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["unipelt", "mam_adapter"])
def test_composed_methods_do_the_same_whichever_axis_comes_first(rule: str) -> None:
    made = []
    x = torch.randn(5, 3, 32)
    for batch_first in (True, False):
        graph = ps.capture(encoder(batch_first), (torch.randn(7, 2, 32),))
        ours = randomise(ps.apply(graph, rule, bottleneck=12), scale=0.2).eval()
        made.append(ours(x) if batch_first else ours(x.transpose(0, 1)).transpose(0, 1))
        assert (made[-1] - encoder(True)(x)).abs().max() > 0.1
    torch.testing.assert_close(made[0], made[1], rtol=0, atol=2e-6)


@pytest.mark.slow
def test_all_tokens_of_a_batch_of_one_are_one_sequence_s() -> None:
    ours = randomise(ps.apply(captured("llama"), "unipelt")).eval()
    tokens = ZOO["llama"].inputs(1, 6)["input_ids"]
    with torch.no_grad():
        alone = ours(input_ids=tokens).logits
        twice = ours(input_ids=tokens.repeat(2, 1)).logits
    torch.testing.assert_close(alone[0], twice[0], rtol=0, atol=1e-6)


def test_rows_that_are_not_known_to_be_one_sequences_are_refused() -> None:
    module = nn.Sequential(nn.Flatten(0, 1), nn.Linear(8, 4))
    graph = ps.capture(module, (torch.randn(2, 5, 8),))
    rule = ps.parse_rules(MEAN.replace("where: {role: ffn.up}", "where: {path: '1'}"))
    with pytest.raises(ps.SurgeryError, match="PSG327"):
        ps.apply(graph, rule)
