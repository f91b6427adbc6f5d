"""What a peft config can say besides the method: patterns, biases, whole modules, kinds of layers.

Each adapter is random, written by peft, read here, compared, written again and loaded by peft.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.errors import SurgeryError
from tests.models.captured import captured as zoo
from tests.models.zoo import ZOO
from tests.parity.models import Attention, base, batch, captured, randomise

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "patterns": (
        "opt",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 6},
            "alpha_pattern": {r"layers\.[01]\.self_attn\.v_proj": 3},
        },
    ),
    "every_bias": ("opt", {"target_modules": ["q_proj", "fc1"], "bias": "all"}),
    "own_bias": ("opt", {"target_modules": ["q_proj", "fc1"], "bias": "lora_only"}),
    "whole_module": ("bert", {"target_modules": ["query"], "modules_to_save": ["transform"]}),
    "whole_tied_head": ("gpt2", {"target_modules": ["c_fc"], "modules_to_save": ["lm_head"]}),
    "regex": ("bert", {"target_modules": r".*layer\.1\..*\.(query|value)"}),
    "one_layer": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "excluded": ("llama", {"target_modules": ["o_proj"], "exclude_modules": r".*layers\.0\..*"}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_rslora": True}),
    "tied_embedding": ("opt", {"target_modules": ["embed_tokens"]}),
    "tied_head": ("opt", {"target_modules": ["lm_head", "k_proj"]}),
    "stabilised_dora": (
        "qwen3",
        {"target_modules": ["k_proj"], "use_rslora": True, "use_dora": True},
    ),
    "first_gaussian": ("qwen3", {"target_modules": ["up_proj"], "init_lora_weights": "gaussian"}),
}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**batch()).logits
    return result


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_config_means_what_peft_takes_it_to_mean(variant: str, tmp_path: Path) -> None:
    name, settings = VARIANTS[variant]
    theirs = get_peft_model(base(name), LoraConfig(r=4, lora_alpha=6, **settings)).eval()
    trainable = {n for n, p in theirs.named_parameters() if p.requires_grad}
    randomise(theirs, lambda parameter: parameter in trainable, 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ps.from_peft(captured(name), tmp_path / "theirs").eval()

    assert (logits(ours) - logits(captured(name))).abs().max() > 1e-3
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-6)
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == sum(
        p.numel() for p in theirs.parameters() if p.requires_grad
    )

    ps.to_peft(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(base(name), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again), logits(ours), rtol=0, atol=1e-6)
    twice = ps.from_peft(captured(name), tmp_path / "ours").eval()
    assert torch.equal(logits(twice), logits(ours))
    torch.testing.assert_close(logits(ps.fold(ours)), logits(ours), rtol=0, atol=2e-6)


class Convolutions(nn.Module):
    """Two convolutions with a linear after them."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, (3, 2), stride=(2, 1), padding=(1, 0))
        self.second = nn.Conv2d(8, 8, 3, groups=groups, bias=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(torch.relu(self.first(x)))
        result: Tensor = self.head(hidden.mean((2, 3)))
        return result


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_convolutions_and_linears_in_one_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Convolutions().eval()
    targets = ["first", "second", "head"]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, lora_dropout=0.1)
    theirs = get_peft_model(deepcopy(module), config).eval()
    randomise(theirs, lambda name: "lora_" in name)
    theirs.save_pretrained(tmp_path / "theirs")
    images = torch.randn(2, 3, 12, 9)
    ours = ps.from_peft(ps.capture(module, (images,)), tmp_path / "theirs").eval()
    more = torch.randn(5, 3, 14, 10)
    torch.testing.assert_close(ours(more), theirs(more), rtol=0, atol=1e-6)
    assert {operation.settings["dropout"] for operation in ours.operations} == {0.1}

    ps.to_peft(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(deepcopy(module), tmp_path / "ours").eval()
    torch.testing.assert_close(again(more), ours(more), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_attention_of_torch_that_peft_wrapped_whole_is_refused(tmp_path: Path) -> None:
    """What peft computes is not what the tensors say: the output projection changes twice over."""
    torch.manual_seed(0)
    module = Attention().eval()
    theirs = get_peft_model(deepcopy(module), LoraConfig(r=4, target_modules=["attention"])).eval()
    randomise(theirs, lambda name: "lora_" in name, 0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    x = torch.randn(3, 5, 16)
    saved = load_file(tmp_path / "theirs" / "adapter_model.safetensors")

    def update(path: str) -> Tensor:
        key = f"base_model.model.attention.{path}lora_"
        return 2.0 * saved[f"{key}B.weight"] @ saved[f"{key}A.weight"]

    said, graph = deepcopy(module), ps.capture(module, (x,))
    with torch.no_grad():
        said.attention.in_proj_weight += update("")
        said.attention.out_proj.weight += update("base_layer.out_proj.")
        assert (said(x) - theirs(x)).abs().max() > 0.01
        said.attention.out_proj.weight += update("base_layer.out_proj.")
    torch.testing.assert_close(said(x), theirs(x), rtol=0, atol=1e-6)
    with pytest.raises(SurgeryError, match=r"PSG504: .*'attention\.out_proj' within an adapter"):
        ps.from_peft(graph, tmp_path / "theirs")
    with pytest.raises(SurgeryError, match="PSG510: 'attention' is a MultiheadAttention"):
        ps.to_peft(ps.apply(graph, "lora_all_linear"), tmp_path / "ours")


def test_a_model_captured_without_its_weights(tmp_path: Path) -> None:
    base("llama").save_pretrained(tmp_path / "base")
    theirs = get_peft_model(
        base("llama"), LoraConfig(r=2, target_modules=["k_proj"], use_dora=True)
    )
    randomise(theirs, lambda name: "lora_" in name)
    theirs.save_pretrained(tmp_path / "theirs")
    graph = ps.capture(str(tmp_path / "base"))
    ours = ps.from_peft(graph, tmp_path / "theirs").eval()
    assert all(p.is_meta for p in graph.parameters()), "reading an adapter needs no weights"
    ids = {"input_ids": batch()["input_ids"]}
    with torch.no_grad():
        expected = theirs.eval()(**ids).logits
        torch.testing.assert_close(ours(**ids).logits, expected, rtol=0, atol=1e-6)
    ps.to_peft(ours, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")


def test_an_adapter_in_half_precision_is_widened(tmp_path: Path) -> None:
    theirs = get_peft_model(base("llama"), LoraConfig(r=2, target_modules=["v_proj"]))
    randomise(theirs, lambda name: "lora_" in name)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file)
    again = PeftModel.from_pretrained(base("llama"), tmp_path).eval()
    ours = ps.from_peft(captured("llama"), tmp_path).eval()
    assert {value.dtype for value in ours.learnt().values()} == {torch.float32}
    torch.testing.assert_close(logits(ours), logits(again), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_grouped_convolutions_are_refused_both_ways(tmp_path: Path) -> None:
    """peft's A reads the channels of all groups, so B A is no kernel of a grouped convolution."""
    module = Convolutions(groups=2).eval()
    theirs = get_peft_model(deepcopy(module), LoraConfig(r=4, target_modules=["second"]))
    with pytest.raises(NotImplementedError):
        theirs.merge_adapter()
    theirs.save_pretrained(tmp_path / "theirs")
    graph = ps.capture(module, (torch.randn(2, 3, 12, 9),))
    with pytest.raises(SurgeryError, match="PSG507: 'second' is a convolution in 2 groups"):
        ps.from_peft(graph, tmp_path / "theirs")
    with pytest.raises(SurgeryError, match="PSG510: 'second' is a convolution in 2 groups"):
        ps.to_peft(ps.apply(graph, "lora_conv"), tmp_path / "ours")


@pytest.mark.parametrize(
    ("rule", "settings"),
    [("lora_qv", {}), ("rslora", {"rank": 2}), ("dora", {"alpha": 5})],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_parts_of_a_fused_weight_become_one_adapter_of_the_whole(
    rule: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    ours = ps.apply(captured("gpt2"), rule, **settings).eval()
    randomise(ours, lambda name: f".{rule}." in name)
    assert all(match["slice"] for match in ours.report.matches)
    ps.to_peft(ours, tmp_path)
    theirs = PeftModel.from_pretrained(base("gpt2"), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-6)
    assert theirs.peft_config["default"].target_modules == {"c_attn"}
    assert theirs.peft_config["default"].r == 2 * ours.operations[0].settings["rank"]


def test_two_adapters_of_which_one_is_written(tmp_path: Path) -> None:
    both = ps.apply(ps.apply(captured("llama"), "lora_qv", name="a"), "lora_qv", name="b", rank=2)
    randomise(both, lambda name: ".b." in name)
    with pytest.raises(SurgeryError, match=r"PSG511: .* 2 adapters"):
        ps.to_peft(both, tmp_path)
    with pytest.raises(SurgeryError, match="PSG511: there is no adapter 'c'"):
        ps.to_peft(both, tmp_path, "c")
    assert not any(tmp_path.iterdir())
    ps.to_peft(both, tmp_path, "b")
    theirs = PeftModel.from_pretrained(base("llama"), tmp_path).eval()
    assert theirs.peft_config["default"].r == 2
    alone = ps.eject(both, "a").eval()
    torch.testing.assert_close(logits(theirs), logits(alone), rtol=0, atol=1e-6)


def test_an_adapter_of_peft_stacks_on_another(tmp_path: Path) -> None:
    for name, module in (("one", "q_proj"), ("two", "v_proj")):
        theirs = get_peft_model(base("llama"), LoraConfig(r=2, target_modules=[module]))
        randomise(theirs, lambda parameter: "lora_" in parameter)
        theirs.save_pretrained(tmp_path / name)
    merged = PeftModel.from_pretrained(base("llama"), tmp_path / "one").merge_and_unload()
    theirs = PeftModel.from_pretrained(merged, tmp_path / "two").eval()
    first = ps.from_peft(captured("llama"), tmp_path / "one", name="one")
    ours = ps.from_peft(first, tmp_path / "two", name="two").eval()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=2e-6)


def test_names_that_end_alike_are_told_apart(tmp_path: Path) -> None:
    """peft reads names as endings: `proj` alone would also mean `inner.proj`."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)
            self.inner = nn.ModuleDict({"proj": nn.Linear(4, 4)})

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.inner["proj"](self.proj(x).relu())
            return result

    torch.manual_seed(0)
    module = Inner().eval()
    rules = ps.parse_rules(
        """
        name: outer
        with: {rank: 2, alpha: 4}
        rules:
          - match: linear
            where: {paths: [proj]}
            params:
              A: {shape: [rank, in], init: normal(1)}
              B: {shape: [out, rank], init: normal(1)}
            rewrite: y + (alpha / rank) * linear(linear(x, A), B)
            fold: W + (alpha / rank) * (B @ A)
            checkpoint: {peft: {A: lora_A.weight, B: lora_B.weight}}
        checkpoint: {peft: {peft_type: LORA, r: rank, lora_alpha: alpha}}
        """
    )
    x = torch.randn(3, 4)
    ours = ps.apply(ps.capture(module, (x,)), rules).eval()
    ps.to_peft(ours, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == "proj"
    theirs = PeftModel.from_pretrained(deepcopy(module), tmp_path).eval()
    torch.testing.assert_close(theirs(x), ours(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["deberta", "deberta_unshared"])
def test_projections_that_distances_go_through_too(name: str, tmp_path: Path) -> None:
    """DeBERTa's distances go through the projections of tokens: one weight, used twice."""
    model = ZOO[name].build()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["query_proj", "value_proj"])
    theirs = get_peft_model(deepcopy(model), config).eval()
    randomise(theirs, lambda parameter: "lora_" in parameter, 0.3)
    theirs.save_pretrained(tmp_path)
    ours = ps.apply(zoo(name), "lora_qv", rank=4, alpha=8).eval()
    values = load_file(tmp_path / "adapter_model.safetensors")
    with torch.no_grad():
        for key, value in ours.learnt().items():
            module, _, letter = key.rpartition(".lora_qv.")
            value.copy_(values.pop(f"base_model.model.{module}.lora_{letter}.weight"))
    assert not values, "the rule is at the modules that peft is told by name, and at no others"
    inputs = ZOO[name].inputs(3, 9)
    with torch.no_grad():
        result, plain = ours(**inputs).logits, zoo(name)(**inputs).logits
        torch.testing.assert_close(result, theirs(**inputs).logits, rtol=0, atol=1e-6)
        torch.testing.assert_close(ps.fold(ours)(**inputs).logits, result, rtol=0, atol=1e-6)
    assert (result - plain).abs().max() > 1e-4
