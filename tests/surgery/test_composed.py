"""Mix-and-match adapters and UniPELT against the original with each of their parts done by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.surgery.model.operated import OperatedModel
from tests.models.captured import captured
from tests.models.zoo import ZOO
from tests.surgery.bottlenecks import Norm, leaves, readout, rewritten, under
from tests.surgery.prefixes import NAMES, prefixed
from tests.surgery.reference import losses_of, randomise

SETTINGS = {"length": 3, "bottleneck": 12, "reduction_factor": 4}
PROJECTIONS = {
    "bert_mlm": ("self.query", "self.value"),
    "llama": ("q_proj", "v_proj"),
    "bart": ("q_proj", "v_proj"),
}
MODELS = tuple(PROJECTIONS)
Values = dict[str, Tensor]


def gate(p: Values, x: Tensor) -> Tensor:
    """One number for each row: the mean over its tokens."""
    return torch.sigmoid(x @ p["G"].T + p["g"]).mean(1, keepdim=True)


def prefix(values: Values, path: str, rule: str) -> tuple[Tensor, Tensor]:
    """Keys and values of a module, from the table and the layer that all of them share."""
    shared = {n.rpartition(".")[2]: v for n, v in values.items() if n[-2:] in (".E", ".W", ".b")}
    p = {n.rpartition(".")[2]: v for n, v in values.items() if n.startswith(f"{path}.{rule}.")}
    inner = torch.tanh(shared["E"] @ shared["W"].T + shared["b"])
    made = [inner @ p[f"W{part}"].T + p[f"b{part}"] for part in "KV"]
    return tuple(x.view(1, 3, -1, 8).transpose(1, 2) for x in made)


def mam(values: Values, name: str, module: nn.Module, monkeypatch: Any) -> Any:
    def new(path: str, h: Tensor, x: Tensor, norm: Norm) -> Tensor:
        p = under(values, path)
        return h + 4 * ((x @ p["D"].T + p["bd"]).clamp(min=0) @ p["U"].T + p["bu"])

    made = prefixed(NAMES[name], lambda path: prefix(values, path, "mam_adapter"), monkeypatch)
    with rewritten(name, module, ("ffn",), new), made:
        return module(**ZOO[name].inputs(3, 6))


def unipelt(values: Values, name: str, module: nn.Module, monkeypatch: Any) -> Any:
    seen: dict[str, Tensor] = {}

    def new(path: str, h: Tensor, x: Tensor, norm: Norm) -> Tensor:
        p, read = under(values, path), norm(h + x)
        added = (read @ p["D"].T + p["bd"]).clamp(min=0) @ p["U"].T + p["bu"]
        return h + gate(p, read) * added

    def low_rank(path: str) -> Any:
        def hook(part: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
            seen.setdefault(path.removesuffix(f".{PROJECTIONS[name][0]}"), args[0])
            p = under(values, path)
            return y + gate(p, args[0]) * (args[0] @ p["A"].T @ p["B"].T)

        return hook

    def gated(path: str) -> tuple[Tensor, Tensor]:
        p = {n.rpartition(".")[2]: v for n, v in values.items() if f"{path}.unipelt." in n}
        scale = gate(p, seen[path])[..., None]
        K, V = prefix(values, path, "unipelt")
        return scale * K, scale * V

    for path in NAMES[name]:
        for part in PROJECTIONS[name]:
            module.get_submodule(f"{path}.{part}").register_forward_hook(low_rank(f"{path}.{part}"))
    with rewritten(name, module, ("ffn",), new), prefixed(NAMES[name], gated, monkeypatch):
        return module(**ZOO[name].inputs(3, 6))


BY_HAND = {"mam_adapter": mam, "unipelt": unipelt}


def made(name: str, rule: str) -> OperatedModel:
    return randomise(ps.apply(captured(name), rule, **SETTINGS), scale=0.2).eval()


@pytest.mark.parametrize("rule", BY_HAND)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_the_parts_by_hand(
    name: str, rule: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ours = made(name, rule)
    values = leaves(ours)
    expected = BY_HAND[rule](values, name, ZOO[name].build(), monkeypatch)
    readout(expected).backward()
    output = ours(**ZOO[name].inputs(3, 6))
    readout(output).backward()
    torch.testing.assert_close(output[0], expected[0], rtol=0, atol=1e-6)
    for key, value in ours.learnt().items():
        assert value.grad is not None, key
        torch.testing.assert_close(value.grad, values[key].grad, rtol=0, atol=1e-5, msg=key)
    ours.save(tmp_path / "saved")
    again = ps.load(tmp_path / "saved", base=captured(name)).eval()
    assert torch.equal(again(**ZOO[name].inputs(3, 6))[0], output[0])
    assert ps.eject(ours) is captured(name)
    with pytest.raises(ps.SurgeryError, match="PSG401"):
        ps.fold(ours)


@pytest.mark.slow
@pytest.mark.parametrize("rule", BY_HAND)
@pytest.mark.parametrize("name", ["t5"])
def test_training_lowers_the_loss_of_an_encoder_and_decoder(name: str, rule: str) -> None:
    model = ps.apply(captured(name), rule, **SETTINGS).train()
    inputs = ZOO[name].inputs(3, 6)
    losses = losses_of(model, {**inputs, "labels": inputs["decoder_input_ids"].flip(1)}, steps=6)
    assert losses[-1] < losses[0] - 0.02
    assert all(p.grad is not None for p in model.learnt().values())
