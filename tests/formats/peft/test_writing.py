"""Writing adapters for peft: whole or not at all; what it has no form for is refused by name."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery import files
from peftsurgery.errors import SurgeryError
from peftsurgery.language.rule_file import RuleFile
from peftsurgery.surgery.model.operated import OperatedModel
from tests.models.captured import captured
from tests.parity.models import randomise


class Fused(nn.Module):
    """An attention layer whose query, key and value are one linear, heads side by side."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24, bias=bias), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.gain = nn.Parameter(torch.ones(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        heads = self.qkv(self.norm(x)).view(rows, length, 2, 12).transpose(1, 2)
        q, k, v = heads.split(4, -1)
        core = nn.functional.scaled_dot_product_attention(q, k, v)
        joined = core.transpose(1, 2).reshape(rows, length, 8)
        result: Tensor = nn.functional.linear(self.out(joined), self.gain)
        return result


X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def graph() -> ps.GraphModel:
    torch.manual_seed(0)
    return ps.capture(Fused().eval(), (X,))


def lora(where: str, table: bool = True, **settings: Any) -> RuleFile:
    """A LoRA of one's own, for the sites that the clauses choose."""
    own = "checkpoint: {peft: {A: lora_A.weight, B: lora_B.weight}}" if table else ""
    keys = "checkpoint: {peft: {peft_type: LORA, r: rank, lora_alpha: alpha}}" if table else ""
    values = {"rank": 2, "alpha": 3} | settings
    return ps.parse_rules(
        f"""
        name: mine
        with: {json.dumps(values)}
        let: {{scale: alpha / rank}}
        rules:
          - match: linear
            where: {{{where}}}
            params:
              A: {{shape: [rank, in], init: normal(1)}}
              B: {{shape: [out, rank], init: zeros}}
            rewrite: y + scale * linear(linear(x, A), B)
            fold: W + scale * (B @ A)
            {own}
        {keys}
        """
    )


def both(graph: ps.GraphModel, *files: RuleFile | str) -> OperatedModel:
    """The rules one after the other under one adapter's name."""
    for file in files:
        graph = ps.apply(graph, file, name="a")
    assert isinstance(graph, OperatedModel)
    randomise(graph, lambda name: ".a." in name)
    return graph


def reloaded(graph: ps.GraphModel, folder: Path) -> Any:
    torch.manual_seed(0)
    return PeftModel.from_pretrained(Fused().eval(), folder).eval()


def test_interleaved_parts_of_different_rank_are_one_adapter(
    graph: ps.GraphModel, tmp_path: Path
) -> None:
    query, value = lora("role: attn.q", rank=2, alpha=3), lora("role: attn.v", rank=4, alpha=6)
    ours = both(graph, query, value, lora("paths: [out]", rank=1, alpha=5)).eval()
    ps.to_peft(ours, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    ranks = {config["r"], *config["rank_pattern"].values()}
    assert ranks == {6, 1}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["base_model.model.qkv.lora_A.weight"].shape == (6, 8)
    B = tensors["base_model.model.qkv.lora_B.weight"].view(2, 3, 4, 6)
    assert B[:, 1].count_nonzero() == 0, "no key row is touched"
    assert B[:, 0, :, 2:].count_nonzero() == 0, "query rows have the first rank"
    torch.testing.assert_close(reloaded(graph, tmp_path)(X), ours(X), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["role: attn.q", "role: attn.v+alpha"], "'qkv' is one fused weight .* differ in 'scale'"),
        (["role: attn.q", "role: attn.qkv"], "'qkv' is adapted more than once"),
        (["role: attn.q-table"], "the rule file 'mine' has no form in peft"),
        (["fed_by: {paths: [out]}"], "'' is a Fused with 'gain', which peft cannot wrap"),
        (["paths: [out]", "dora"], "'a' has use_dora = "),
    ],
)
def test_what_peft_has_no_form_for_is_refused_by_name(
    graph: ps.GraphModel, files: list[str], message: str, tmp_path: Path
) -> None:
    def made(text: str) -> RuleFile | str:
        where = text.removesuffix("-table").removesuffix("+alpha")
        alpha = 5 if text.endswith("+alpha") else 3
        return lora(where, not text.endswith("-table"), alpha=alpha) if ":" in text else text

    ours = both(graph, *(made(text) for text in files))
    with pytest.raises(SurgeryError, match=rf"PSG510: {message}"):
        ps.to_peft(ours, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_trained_parameters_are_said_by_the_nearest_of_pefts_ways(
    graph: ps.GraphModel, tmp_path: Path
) -> None:
    train = "name: t\nrules: [{match: parameter, where: {%s}, train: true}]"
    norm = ps.parse_rules(train % "paths: [norm.weight]")
    ours = both(graph, lora("paths: [out]"), norm).eval()
    with torch.no_grad():
        ours.get_parameter("norm.weight").mul_(1.5)
    ps.to_peft(ours, tmp_path / "module")
    theirs = reloaded(graph, tmp_path / "module")
    assert theirs.peft_config["default"].modules_to_save == ["norm"]
    torch.testing.assert_close(theirs(X), ours(X), rtol=0, atol=2e-6)

    bias = ps.parse_rules(train % "paths: [out.bias]")
    ps.to_peft(both(graph, lora("paths: [out]"), bias), tmp_path / "bias")
    config = json.loads((tmp_path / "bias" / "adapter_config.json").read_text())
    assert (config["bias"], config["modules_to_save"]) == ("lora_only", None)

    weight = ps.parse_rules(train % "paths: [out.weight]")
    with pytest.raises(SurgeryError, match="PSG510: 'out' was trained, and peft cannot train"):
        ps.to_peft(both(graph, lora("paths: [out]"), weight), tmp_path / "weight")
    alone = ps.apply(graph, norm)
    with pytest.raises(SurgeryError, match="PSG510: 't' adds no parameters"):
        ps.to_peft(alone, tmp_path / "alone")


def test_a_model_without_adapters_has_nothing_to_write(
    graph: ps.GraphModel, tmp_path: Path
) -> None:
    with pytest.raises(SurgeryError, match="PSG511: the model has no adapters"):
        ps.to_peft(graph, tmp_path / "out")


def test_nothing_is_left_when_writing_fails(
    graph: ps.GraphModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = both(graph, lora("paths: [out]"))
    ps.to_peft(ours, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    written: list[Path] = []

    def full(part: Path, content: bytes) -> None:
        written.append(part)
        part.write_bytes(content[: len(content) // 2])
        if len(written) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_write", full)
    with pytest.raises(SurgeryError, match=r"PSG603: .*No space left on device"):
        ps.to_peft(ours, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("place", ["/proc/zz", "/dev/full/x", "a\0b"])
def test_a_place_that_cannot_be_written_is_refused(graph: ps.GraphModel, place: str) -> None:
    with pytest.raises(SurgeryError, match=r"PSG603: .*cannot be written"):
        ps.to_peft(both(graph, lora("paths: [out]")), place)


def test_only_an_adapter_is_replaced(graph: ps.GraphModel, tmp_path: Path) -> None:
    ours = both(graph, lora("paths: [out]"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("x")
    for name in ("model", "file"):
        with pytest.raises(SurgeryError, match="PSG601"):
            ps.to_peft(ours, tmp_path / name)
    ps.to_peft(ours, tmp_path / "deep" / "new")
    ps.to_peft(ours, tmp_path / "deep" / "new")
    names = sorted(file.name for file in (tmp_path / "deep" / "new").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    LoraConfig.from_pretrained(tmp_path / "deep" / "new")


@pytest.mark.parametrize(
    "name", ["lora_qv", "dora", "ia3", "loha", "lokr", "oft", "trainable_tokens", "prompt_tuning"]
)
def test_a_config_has_no_key_that_pefts_own_has_not(name: str, tmp_path: Path) -> None:
    ps.to_peft(ps.apply(captured("llama"), name), tmp_path / "out")
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    known = inspect.signature(PEFT_TYPE_TO_CONFIG_MAPPING[said["peft_type"]]).parameters
    assert said.keys() <= known.keys()


def test_what_is_trained_besides_is_refused_where_peft_would_not_save_it(tmp_path: Path) -> None:
    trained = ps.apply(captured("llama"), "trainable_tokens", train=["lm_head.weight"])
    with pytest.raises(SurgeryError, match="PSG510: 'lm_head' was trained, and peft saves no"):
        ps.to_peft(trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()
