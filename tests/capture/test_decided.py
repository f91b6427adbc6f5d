"""Code that goes by values: by those of its inputs, which become conditions, or by others.

Captures are compared with the original for inputs that decide alike and otherwise.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import FSMTConfig, FSMTForConditionalGeneration

import peftsurgery as ps
from peftsurgery.errors import SurgeryError


class Masked(nn.Module):
    """A mask is left out where it masks nothing, as FSMT does it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        found = self.table(ids)
        hidden = ids.eq(1)
        if not hidden.any():
            return self.out(found)
        return self.out(found.masked_fill(hidden.unsqueeze(-1), 0.0)) * 2


class Global(nn.Module):
    """Tokens that attend globally are looked for, as Longformer does it."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        padded = nn.functional.pad(mask, (0, -x.shape[1] % 4)).clone()
        padded[padded == 2] = 9.0
        is_global = (padded > 8).flatten().any().item()
        windows = torch.div(padded.shape[1], 4, rounding_mode="trunc")
        x = nn.functional.pad(x, (0, 0, 0, -x.shape[1] % 4)).view(x.shape[0], windows, 4, 4)
        return self.near(x).sum(2) + (
            self.far(x.mean((1, 2), keepdim=True)[:, 0]) if is_global else 0
        )


class Behind(nn.Module):
    """What is asked was written through a view."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        mask = mask.clone()
        mask[:, 1:].mul_(x.sum())
        return x * 2 if (mask > 1).any() else x


class Hit(nn.Module):
    """Only the experts that some token chose are run, as LongCat-Flash does it."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        made = torch.zeros_like(x)
        for index in chosen.unique():
            made[chosen == index] = self.experts[int(index)](x[chosen == index])
        return made


def test_a_mask_that_masks_nothing_is_left_out_and_others_are_captured_when_they_come() -> None:
    torch.manual_seed(0)
    model = Masked().eval()
    graph = ps.capture(model, {"ids": torch.randint(2, 9, (2, 5))})
    lengths = [torch.randint(2, 9, (3, 7)), torch.tensor([[1, 2], [3, 1]]), torch.tensor([[4, 5]])]
    for ids in lengths:
        assert torch.equal(graph(ids), model(ids))
    assert len(graph.captures) == 2
    assert any("if not hidden.any(): is False" in note for note in graph.base_capture.notes)
    operated = ps.apply(graph, "lora_all_linear")
    for ids in lengths:
        assert torch.equal(operated(ids), model(ids))


def test_what_inputs_say_of_themselves_is_a_condition() -> None:
    torch.manual_seed(0)
    model, mask = Global().eval(), torch.ones(2, 6)
    graph = ps.capture(model, {"x": torch.randn(2, 6, 4), "mask": mask})
    for length, marked in ((6, False), (6, True), (8, False), (9, True)):
        x, mask = torch.randn(3, length, 4), torch.ones(3, length)
        mask[1, 2] += marked
        assert torch.equal(graph(x, mask), model(x, mask))


def test_what_was_written_through_a_view_is_not_known() -> None:
    with pytest.raises(SurgeryError, match=r"PSG228: Behind .*if \(mask > 1\).any\(\)"):
        ps.capture(Behind(), {"x": torch.ones(2, 6), "mask": torch.ones(2, 6)})


def test_a_file_for_all_values_is_not_written(tmp_path: Path) -> None:
    graph = ps.capture(Masked().eval(), {"ids": torch.randint(2, 9, (2, 5))})
    with pytest.raises(SurgeryError, match=r"PSG229.*hidden.any\(\): is False"):
        ps.export_pt2(graph, tmp_path / "m.pt2")
    with pytest.raises(SurgeryError, match="PSG229"):
        ps.export_onnx(graph, tmp_path / "m.onnx", adapters="inputs")


@pytest.mark.slow
def test_a_model_of_transformers_that_looks_for_padding() -> None:
    parts = {"ffn_dim": 8, "layers": 2, "attention_heads": 2}
    sizes = {f"{side}_{k}": v for k, v in parts.items() for side in ("encoder", "decoder")}
    vocabulary = {"src_vocab_size": 9, "tgt_vocab_size": 9, "langs": ["en", "de"]}
    config = FSMTConfig(d_model=8, **vocabulary, **sizes)
    model = FSMTForConditionalGeneration(config).eval()
    model.config.use_cache = False
    graph = ps.capture(model)
    for padding in (0, 2):
        ids = torch.randint(3, 9, (3, 7))
        ids[1, 7 - padding :] = config.pad_token_id
        given = {"input_ids": ids, "attention_mask": ids.ne(config.pad_token_id).long()}
        given["decoder_input_ids"] = torch.randint(3, 9, (3, 4))
        with torch.no_grad():
            assert torch.equal(graph(**given).logits, model(**given).logits)


def test_what_weights_decide_is_refused_with_its_line() -> None:
    line = r"PSG228: Hit .*test_decided.py:\d+: .*for index in"
    with pytest.raises(SurgeryError, match=line) as e:
        ps.capture(Hit(), {"x": torch.randn(2, 5, 4)})
    assert "unique" in e.value.message
