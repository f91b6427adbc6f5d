"""Further captures: a rule cuts in them where it cut in the first, or they are refused."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftsurgery as ps
from peftsurgery.surgery.model.operated import OperatedModel
from tests.models.zoo import hf
from tests.surgery.reference import randomise

START, PAD, VOCABULARY = 1, 0, 64


@cache
def listener() -> nn.Module:
    """A model that hears and writes: its decoder's table is its head, no encoder shares it."""
    torch.manual_seed(0)
    make = hf(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        vocab_size=VOCABULARY,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=20,
        max_target_positions=24,
        decoder_start_token_id=START,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
    )
    return make().eval()


@cache
def heard() -> ps.GraphModel:
    return ps.capture(listener())


def speech() -> tuple[Tensor, Tensor, Tensor]:
    """Features, labels of which some are ignored, and the decoder's ids that they are shifted to.

    That they are is what the original says.
    """
    sound, labels = torch.randn(2, 8, 40), torch.randint(3, VOCABULARY, (2, 7))
    labels[0, -2:] = -100
    shifted = torch.cat([torch.full((2, 1), START), labels[:, :-1]], dim=1)
    ids = shifted.masked_fill(shifted == -100, PAD)
    with torch.no_grad():
        by_labels = listener()(input_features=sound, labels=labels).logits
        by_ids = listener()(input_features=sound, decoder_input_ids=ids).logits
    assert torch.equal(by_labels, by_ids)
    return sound, labels, ids


def gradients(model: OperatedModel, loss: Tensor) -> dict[str, Tensor]:
    free = {name: value for name, value in model.learnt().items() if value.requires_grad}
    return dict(zip(free, torch.autograd.grad(loss, free.values()), strict=True))


RULES: dict[str, dict[str, int]] = {
    "lora_embedding": {},
    "lora_all_linear": {},
    "qlora": {},
    "adalora": {},
    "houlsby": {},
    "bitfit": {},
    "p_tuning_v2": {"length": 3},  # the encoder's table of positions has no row to spare
}


@pytest.mark.slow
@pytest.mark.parametrize("rules", RULES)
def test_labels_reach_what_the_ids_they_are_shifted_to_reach(rules: str) -> None:
    sound, labels, ids = speech()
    operated = randomise(ps.apply(heard(), rules, **RULES[rules]), scale=0.2).eval()
    given = operated(input_features=sound, labels=labels)
    logits = operated(input_features=sound, decoder_input_ids=ids).logits
    assert torch.equal(given.logits, logits)
    original = listener()(input_features=sound, labels=labels).logits
    assert (given.logits - original).abs().max() > 1e-2
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(given.loss, loss)
    torch.testing.assert_close(gradients(operated, given.loss), gradients(operated, loss))


@pytest.mark.slow
def test_an_adapted_table_learns_from_labels_what_hooks_on_the_original_learn() -> None:
    sound, labels, _ = speech()
    operated = randomise(ps.apply(heard(), "lora_embedding", rank=2, alpha=4), scale=0.5)
    A, B = operated.learnt().values()

    def add(part: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        return y + 2.0 * (A.T[args[0]] @ B.T)

    handle = listener().model.decoder.embed_tokens.register_forward_hook(add)
    try:
        expected = listener()(input_features=sound, labels=labels)
    finally:
        handle.remove()
    given = operated(input_features=sound, labels=labels)
    torch.testing.assert_close(given.logits, expected.logits)
    torch.testing.assert_close(given.loss, expected.loss)
    found = torch.autograd.grad(given.loss, (A, B))
    torch.testing.assert_close(found, torch.autograd.grad(expected.loss, (A, B)))


class Reader(nn.Module):
    """Reads ids, their embeddings, or numbers that no graph shows to be ids; its table is its head.

    With ``smooth`` another activation is in the middle.
    """

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 8)
        self.mix = nn.Linear(8, 8)

    def forward(
        self,
        ids: Tensor | None = None,
        embeds: Tensor | None = None,
        raw: Tensor | None = None,
        smooth: Tensor | None = None,
    ) -> Tensor:
        if raw is not None:
            ids = (raw * 40).long()
        x = self.table(ids) if embeds is None else embeds
        x = self.mix(x)
        x = F.silu(x) if smooth is None else F.gelu(x) + smooth
        return F.linear(x, self.table.weight)


IDS = torch.randint(0, 40, (2, 5), generator=torch.Generator().manual_seed(0))
TABLE: dict[str, Any] = {
    "match": "embedding",
    "params": {"s": {"shape": ["out"], "init": "ones"}},
    "rewrite": "y * s",
}


def test_a_weight_that_is_used_otherwise_than_the_rule_was_applied_to_is_refused() -> None:
    reader = Reader()
    raw = (IDS + 0.5) / 40
    assert torch.equal(reader(raw=raw), reader(IDS))
    operated = randomise(ps.apply(ps.capture(reader, inputs={"ids": IDS}), "lora_embedding"))
    with pytest.raises(ps.SurgeryError, match=r"PSG318.*'table\.lora_embedding'"):
        operated(raw=raw)
    operated.deactivate()
    torch.testing.assert_close(operated(raw=raw), reader(IDS))


def test_a_rule_that_chooses_by_path_finds_its_place_with_any_inputs() -> None:
    rule = ps.Rule(**TABLE, where={"path": "table"})
    operated = randomise(ps.apply(ps.capture(Reader(), inputs={"ids": IDS}), rule))
    torch.testing.assert_close(operated(raw=(IDS + 0.5) / 40), operated(IDS))


def test_a_tied_weight_of_which_the_other_use_was_adapted_is_no_loss() -> None:
    reader = Reader()
    operated = randomise(ps.apply(ps.capture(reader, inputs={"ids": IDS}), "lora_embedding"))
    embeds = torch.randn(2, 5, 8)
    torch.testing.assert_close(operated(embeds=embeds), reader(embeds=embeds))


def test_a_pattern_that_is_no_more_around_its_weight_is_refused() -> None:
    rule = ps.Rule(
        match={"pattern": "silu(linear(x, W, b))"},
        params={"s": {"shape": [8], "init": "ones"}},
        rewrite="y * s",
    )
    operated = ps.apply(ps.capture(Reader(), inputs={"ids": IDS}), rule)
    with pytest.raises(ps.SurgeryError, match="PSG318"):
        operated(ids=IDS, smooth=torch.zeros(1))


class Watcher(nn.Module):
    """Attention that looks back, or where a mask allows; then a head, unless there are weights."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 3)

    def forward(
        self, x: Tensor, seen: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in self.parts[:3])
        y = F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None)
        mixed: Tensor = self.parts[3](y.transpose(1, 2).flatten(2))
        return mixed * weights if weights is not None else self.head(mixed)


def test_attention_that_a_rule_does_not_choose_any_more_is_refused() -> None:
    x = torch.randn(2, 5, 8)
    rule = ps.Rule(
        match="attention",
        where={"facts": {"causal": True}},
        params={"s": {"shape": ["head_dim"], "init": "ones"}},
        rewrite="o * s",
    )
    operated = ps.apply(ps.capture(Watcher(), inputs={"x": x}), rule)
    with pytest.raises(ps.SurgeryError, match="PSG318"):
        operated(x=x, seen=torch.ones(5, 5, dtype=torch.bool))


def test_a_head_that_is_not_reached_is_not_missed() -> None:
    x, weights = torch.randn(2, 5, 8), torch.rand(8)
    watcher = Watcher()
    operated = ps.apply(ps.capture(watcher, inputs={"x": x}), "lora_all_linear")
    torch.testing.assert_close(operated(x=x, weights=weights), watcher(x, weights=weights))
    with torch.no_grad():
        operated.get_parameter("head.lora_all_linear.B").add_(1.0)
    assert not torch.equal(operated(x=x), watcher(x))
    torch.testing.assert_close(operated(x=x, weights=weights), watcher(x, weights=weights))
