"""A module that has no config, made by a factory with its inputs, in every command that opens one.

The expected values are those of the module itself, with what was sewn in added by hand.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftsurgery as ps

WIDTH = 16


class Attention(nn.Module):
    """An attention core with the names that diffusers gives its parts."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        maps = (self.to_q(x), self.to_k(context), self.to_v(context))
        q, k, v = (m.unflatten(-1, (2, -1)).transpose(1, 2) for m in maps)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        for part in self.to_out:
            mixed = part(mixed)
        return mixed


class UNet2DConditionModel(nn.Module):
    """A small network of the kind, under the class name that image tools know."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, WIDTH, 3, padding=1)
        self.time = nn.Linear(6, WIDTH)
        self.blocks = nn.ModuleList([Attention(WIDTH, 12) for _ in range(2)])
        self.conv_out = nn.Conv2d(WIDTH, 4, 3, padding=1)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, states: torch.Tensor
    ) -> torch.Tensor:
        x = self.conv_in(sample) + self.time(timestep)[:, :, None, None]
        rows = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            rows = rows + block(rows, states)
        return self.conv_out(rows.transpose(1, 2).unflatten(2, x.shape[2:]))


def inputs_for(batch: int, side: int, tokens: int) -> dict[str, torch.Tensor]:
    return {
        "sample": torch.randn(batch, 4, side, side),
        "timestep": torch.randn(batch, 6),
        "states": torch.randn(batch, tokens, 12),
    }


def unet() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return UNet2DConditionModel().eval(), inputs_for(2, 8, 5)


SPEC = f"{__name__}:unet"


@pytest.fixture(scope="module")
def surgery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained LoRA on it, saved."""
    operated = ps.apply(ps.capture(SPEC), "lora_qv", rank=2)
    torch.manual_seed(0)
    for name, parameter in operated.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=0.3)
    path = tmp_path_factory.mktemp("unet") / "surgery"
    operated.save(path)
    return path


@pytest.fixture(scope="module")
def expected(surgery: Path) -> UNet2DConditionModel:
    """The module itself, with 16 / 2 times B A added to its weights."""
    model, learnt = UNet2DConditionModel(), load_file(surgery / "adapter.safetensors")
    state = ps.capture(SPEC).state_dict()
    for key, down in learnt.items():
        module, _, leaf = key.rpartition(".lora_qv.")
        if leaf == "A":
            up = learnt[f"{module}.lora_qv.B"]
            state[f"{module}.weight"] = state[f"{module}.weight"] + 8 * up @ down
    model.load_state_dict(state)
    return model.eval()


def test_it_is_operated_on_and_saved(run: Any, tmp_path: Path) -> None:
    outcome = run("apply", SPEC, "lora_qv", "-o", tmp_path / "out", "--diff", "--json")
    assert outcome.code == 0, outcome.out
    assert len(outcome.json["matches"]) == 4
    assert run("inspect", tmp_path / "out", "--json").json["base"] == SPEC


def test_it_is_inspected_and_explained(run: Any, tmp_path: Path) -> None:
    sites = run("inspect", SPEC, "--json").json["sites"]
    roles = {site["role"] for site in sites if site["kind"] == "linear"}
    assert {"attn.q", "attn.k", "attn.v", "attn.o"} <= roles
    assert run("why", SPEC, "lora_qv", "blocks.0.to_q", "--json").json[0]["kept"] is True
    assert run("inspect", SPEC, "--html", tmp_path / "page.html").code == 0
    assert "blocks.0" in (tmp_path / "page.html").read_text()


def test_it_is_compared_with_what_was_made_of_it(run: Any, surgery: Path) -> None:
    assert run("diff", SPEC, SPEC).code == 0
    outcome = run("diff", SPEC, surgery, "--weights", "--json")
    assert outcome.code == 1
    assert len([each for each in outcome.json["changes"] if each["part"] == "insertion"]) == 2


def test_it_is_folded_to_the_weights_that_are_computed_by_hand(
    run: Any, surgery: Path, expected: nn.Module, tmp_path: Path
) -> None:
    outcome = run("fold", surgery, "-o", tmp_path / "out", "--verify")
    assert outcome.code == 0, outcome.err
    folded = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(folded, expected.state_dict(), rtol=1e-6, atol=1e-6)


def test_what_was_folded_is_a_model_like_others(
    run: Any, surgery: Path, expected: UNet2DConditionModel, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ps.fold_to_directory(surgery, out)
    outcome = run("diff", SPEC, out, "--weights", "--json")
    assert (outcome.code, outcome.json["differs"]) == (
        1,
        {"structure": False, "config": False, "weights": True},
    )
    assert {(e["where"], e["text"].partition(",")[0]) for e in outcome.json["changes"]} == {
        (f"blocks.{{0..1}}.{part}.weight", "low-rank (rank 2)") for part in ("to_q", "to_v")
    }
    graph, inputs = ps.capture(str(out)), inputs_for(3, 6, 7)
    torch.testing.assert_close(graph(**inputs), expected(**inputs), rtol=1e-5, atol=1e-5)
    ps.apply(graph, "lora_qv").save(tmp_path / "onto")
    assert run("inspect", tmp_path / "onto", "--json").json["base"] == str(out)


@pytest.mark.parametrize(
    ("base", "code"), [(None, "PSG205"), ("itself", "PSG205"), (f"{__name__}:inputs_for", "PSG205")]
)
def test_a_folded_module_that_nothing_makes_is_refused(
    run: Any, surgery: Path, tmp_path: Path, base: str | None, code: str
) -> None:
    out = tmp_path / "out"
    ps.fold_to_directory(surgery, out)
    record = json.loads((out / "peftsurgery.json").read_text())
    record["base"] = str(out) if base == "itself" else base
    (out / "peftsurgery.json").write_text(json.dumps(record))
    assert run("diff", SPEC, out, "--json").json["error"]["code"] == code


def test_weights_of_another_module_are_refused(run: Any, surgery: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ps.fold_to_directory(surgery, out)
    save_file({"other": torch.ones(2)}, out / "model.safetensors")
    error = run("inspect", out, "--json").json["error"]
    assert error["code"] == "PSG207"
    assert SPEC in error["message"]


def test_it_is_exported_under_kohyas_names(
    run: Any, surgery: Path, expected: nn.Module, tmp_path: Path
) -> None:
    outcome = run("export", surgery, "--to", "kohya", "-o", tmp_path / "lora.safetensors")
    assert outcome.code == 0, outcome.err
    read, base = load_file(tmp_path / "lora.safetensors"), ps.capture(SPEC).state_dict()
    for path in ("blocks.0.to_q", "blocks.1.to_v"):
        key = f"lora_unet_{path.replace('.', '_')}"
        down, up = read[f"{key}.lora_down.weight"], read[f"{key}.lora_up.weight"]
        sum_ = base[f"{path}.weight"] + read[f"{key}.alpha"] / len(down) * up @ down
        torch.testing.assert_close(sum_, expected.get_parameter(f"{path}.weight").data)


@pytest.mark.slow
def test_it_is_exported_as_onnx(
    run: Any, surgery: Path, expected: nn.Module, tmp_path: Path
) -> None:
    outcome = run("export", surgery, "--to", "onnx", "-o", tmp_path / "unet.onnx")
    assert outcome.code == 0, outcome.err
    inputs = inputs_for(3, 6, 9)
    session = onnxruntime.InferenceSession(tmp_path / "unet.onnx")
    (output,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    assert (
        run("diff", SPEC, tmp_path / "unet.onnx").code == 0
    )  # sizes that are fixed are so there too
    np.testing.assert_allclose(output, expected(**inputs).detach(), atol=1e-5)
