"""target_parameters: what peft puts at stacks of experts computes here what it computes there.

The oracle is peft itself, on the same base in the same process: outputs, and the merged weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import peftsurgery as ps
from peftsurgery.errors import SurgeryError
from tests.parity.models import randomise
from tests.parity.test_experts import CHOICE, FOUR, built

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

STACKS = ["experts.gate_up_proj", "experts.down_proj"]
FIRST, LAST = "mlp.experts.base_layer", "mlp.experts"


class Experts(nn.Module):
    """Two stacks, each held (experts, out, in), or (experts, in, out) if ``turned``."""

    def __init__(self, turned: bool, says: bool, wide: int, inner: int, experts: int = 3) -> None:
        super().__init__()
        self.is_transposed, self.turned = says, turned
        for name, (out, in_) in {"gate_up_proj": (inner, wide), "down_proj": (wide, inner)}.items():
            shape = (experts, in_, out) if turned else (experts, out, in_)
            self.register_parameter(name, nn.Parameter(torch.randn(shape, dtype=torch.float64)))

    def forward(self, x: Tensor) -> Tensor:
        gate_up, down = self.gate_up_proj, self.down_proj
        if not self.turned:
            gate_up, down = gate_up.mT, down.mT
        rows = torch.bmm(x.expand(len(gate_up), -1, -1), gate_up).tanh()
        return torch.bmm(rows, down).sum(0)


class Layer(nn.Module):
    """A linear and experts behind it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 6, dtype=torch.float64)
        self.mlp = nn.ModuleDict({"experts": Experts(**settings)})

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.mlp["experts"](self.proj(x))
        return result


def layer(turned: bool = False, says: bool = False, inner: int = 8, experts: int = 3) -> Layer:
    torch.manual_seed(0)
    return Layer(turned=turned, says=says, wide=6, inner=inner, experts=experts).eval()


def trained(module: nn.Module, folder: Path, **config: Any) -> Any:
    """A peft adapter with values that show, saved in a directory; the model it is on."""
    given = {"r": 2, "lora_alpha": 3, "target_modules": [], "target_parameters": STACKS}
    theirs = get_peft_model(deepcopy(module), LoraConfig(**{**given, **config})).eval()
    randomise(theirs, lambda name: "lora_" in name, 0.3)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:  # adapters are kept in single precision here
            parameter.data = parameter.data.float().to(parameter.dtype)
    theirs.save_pretrained(folder)
    return theirs


def rows() -> Tensor:
    return torch.randn(5, 6, dtype=torch.float64)


def agrees(ours: nn.Module, theirs: Any, x: Tensor, count: int) -> None:
    """Outputs, and every merged weight, within 1e-6; ``count`` weights are changed."""
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-6)
    before = {n.replace("base_layer.", ""): p.clone() for n, p in theirs.model.named_parameters()}
    merged = theirs.merge_and_unload().state_dict()
    folded = ps.fold(ours).state_dict()
    assert sum(not torch.equal(merged[name], before[name]) for name in merged) == count
    for name, value in merged.items():
        torch.testing.assert_close(folded[name], value, rtol=0, atol=1e-6)


CONFIGS: dict[str, tuple[dict[str, Any], int]] = {
    "both stacks": ({}, 2),
    "the first alone": ({"target_parameters": STACKS[:1]}, 1),
    "the last alone": ({"target_parameters": ["mlp.experts.down_proj"]}, 1),
    "named the other way round": ({"target_parameters": STACKS[::-1]}, 2),
    "with a linear": ({"target_modules": ["proj"]}, 3),
    "ranks and scales of their own": (
        {
            "rank_pattern": {"experts.down_proj": 3},
            "alpha_pattern": {r".*\.gate_up_proj": 7},
            "use_rslora": True,
        },
        2,
    ),
}
HELD = {
    "(out, in)": (False, False),
    "(in, out), as it says": (True, True),
    "(in, out), unsaid": (True, False),
}


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("config", CONFIGS)
def test_stacks_compute_and_merge_as_in_peft(config: str, held: str, tmp_path: Path) -> None:
    module = layer(*HELD[held])
    given, count = CONFIGS[config]
    theirs, x = trained(module, tmp_path, **given), rows()
    agrees(ps.from_peft(ps.capture(module, (x,)), tmp_path), theirs, x, count)


def test_stacks_of_square_matrices_are_read_where_every_version_reads_them_alike(
    tmp_path: Path,
) -> None:
    module, x = layer(True, True, inner=6), rows()
    theirs = trained(module, tmp_path / "said")
    agrees(ps.from_peft(ps.capture(module, (x,)), tmp_path / "said"), theirs, x, 2)
    for turned in (False, True):
        module = layer(turned, False, inner=6)
        trained(module, tmp_path / "unsaid")
        with pytest.raises(SurgeryError, match=r"PSG507: .*has square"):
            ps.from_peft(ps.capture(module, (x,)), tmp_path / "unsaid")


def test_two_adapters_of_one_stack_take_turns_and_add_up_as_in_peft(tmp_path: Path) -> None:
    module, x = layer(), rows()
    for name, rank in (("one", 2), ("two", 3)):
        torch.manual_seed(rank)
        trained(module, tmp_path / name, r=rank)
    ours = ps.from_peft(ps.capture(module, (x,)), tmp_path / "one", name="one")
    ours = ps.from_peft(ours, tmp_path / "two", name="two")
    theirs = PeftModel.from_pretrained(deepcopy(module), tmp_path / "one", adapter_name="one")
    theirs.load_adapter(tmp_path / "two", adapter_name="two")
    for name in ("one", "two"):
        theirs.set_adapter(name)
        with ours.only(name):
            torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-6)
    theirs.base_model.set_adapter(["one", "two"])
    merged = theirs.merge_and_unload(adapter_names=["one", "two"])
    torch.testing.assert_close(ours(x), merged(x), rtol=0, atol=1e-6)


def test_the_order_of_keys_in_the_file_says_nothing(tmp_path: Path) -> None:
    module, x = layer(), rows()
    theirs = trained(module, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(dict(reversed(load_file(file).items())), file)
    agrees(ps.from_peft(ps.capture(module, (x,)), tmp_path), theirs, x, 2)


def test_what_was_read_is_saved_and_loaded_as_a_surgery(tmp_path: Path) -> None:
    module, x = layer(True, False), rows()
    theirs = trained(module, tmp_path / "theirs", target_modules=["proj"])
    graph = ps.capture(module, (x,))
    ps.from_peft(graph, tmp_path / "theirs").save(tmp_path / "ours")
    agrees(ps.load(tmp_path / "ours", base=graph), theirs, x, 3)


def moved(tensors: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    start = f"base_model.model.{old}.lora_"
    return {k.replace(start, f"base_model.model.{new}.lora_"): v for k, v in tensors.items()}


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
DAMAGED: dict[str, tuple[Change, str]] = {
    "no inner wrapper": (
        lambda t: {k: v for k, v in t.items() if FIRST not in k},
        "PSG508: .*means 'mlp.experts.gate_up_proj', and the adapter has no tensors",
    ),
    "no outer wrapper": (
        lambda t: {k: v for k, v in t.items() if FIRST in k},
        "PSG508: .*means 'mlp.experts.down_proj', and the adapter has no tensors",
    ),
    "one wrapper too many": (
        lambda t: t | {k.replace(FIRST, f"{FIRST}.base_layer"): v for k, v in t.items()},
        f"PSG508: .*tensors for '{FIRST}.base_layer', which target_parameters does not mean",
    ),
    "wrappers changed over": (
        lambda t: moved(moved(moved(t, LAST, "x"), FIRST, LAST), "x", FIRST),
        "PSG507: .* has shape",
    ),
    "a wrapper in the path": (
        lambda t: moved(t, FIRST, "mlp.base_layer.experts"),
        "PSG504: .*within an adapter of the module around it",
    ),
    "A without B": (
        lambda t: {k: v for k, v in t.items() if k != f"base_model.model.{FIRST}.lora_B.weight"},
        "PSG507: the adapter of 'mlp.experts.gate_up_proj' has no 'lora_B.weight'",
    ),
    "an adapter of a linear": (
        lambda t: (
            t
            | {
                f"base_model.model.proj.lora_{n}.weight": torch.ones(s, dtype=torch.float64)
                for n, s in (("A", (2, 6)), ("B", (6, 2)))
            }
        ),
        "PSG508: .*tensors for 'proj', which target_parameters does not mean",
    ),
    "experts apart": (lambda t: {k: v[..., None] for k, v in t.items()}, "PSG507: .* has shape"),
}
CHANGED: dict[str, tuple[dict[str, Any], str]] = {
    "another name": (
        {"target_parameters": ["experts.w"]},
        r"PSG508: .*names 'experts.w', and no parameter",
    ),
    "a name among others": (
        {"target_parameters": [*STACKS, "up"]},
        "PSG508: .*names 'up', and no parameter",
    ),
    "the weight of a linear": (
        {"target_parameters": [*STACKS, "proj.weight"]},
        "PSG508: .*means 'proj.weight', and the adapter has no tensors",
    ),
    "a text": ({"target_parameters": "experts.down_proj"}, "PSG503: .*is no list of names"),
    "numbers": ({"target_parameters": [1]}, "PSG503: .*is no list of names"),
    "none": ({"target_parameters": None}, "PSG504: .*within an adapter of the module around it"),
    "one": (
        {"target_parameters": STACKS[1:]},
        f"PSG508: .*tensors for '{FIRST}', which target_parameters does not mean",
    ),
    "dropout": ({"lora_dropout": 0.1}, "PSG504: the adapter has lora_dropout = 0.1 and"),
    "biases": ({"bias": "all"}, "PSG504: the adapter has bias = 'all' and"),
    "a module that is saved whole": (
        {"modules_to_save": ["experts"]},
        "PSG504: .*whose module peft wraps otherwise",
    ),
    "another rank": ({"r": 3}, "PSG507: .* has shape"),
    "a pattern of nothing": ({"rank_pattern": {"nothing": 3}}, "PSG508: .*names 'nothing'"),
    "another method": ({"peft_type": "ADALORA"}, "PSG504: .*which its method has no rule for"),
    "vectors of lengths": ({"use_dora": True}, "PSG504: "),
}


@pytest.fixture(scope="module")
def captured() -> ps.GraphModel:
    return ps.capture(layer(), (rows(),))


@pytest.mark.parametrize("case", DAMAGED)
def test_tensors_that_are_not_those_of_the_config_are_refused(
    case: str, tmp_path: Path, captured: ps.GraphModel
) -> None:
    trained(layer(), tmp_path)
    change, pattern = DAMAGED[case]
    file = tmp_path / "adapter_model.safetensors"
    save_file(
        {key: value.contiguous().clone() for key, value in change(load_file(file)).items()}, file
    )
    with pytest.raises(SurgeryError, match=pattern):
        ps.from_peft(captured, tmp_path)


@pytest.mark.parametrize("case", CHANGED)
def test_configs_that_peft_has_no_such_adapter_for_are_refused(
    case: str, tmp_path: Path, captured: ps.GraphModel
) -> None:
    trained(layer(), tmp_path)
    change, pattern = CHANGED[case]
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(SurgeryError, match=pattern):
        ps.from_peft(captured, tmp_path)


def test_parameters_that_are_no_stacks_of_several_are_refused(tmp_path: Path) -> None:
    module, x = layer(), rows()
    trained(module, tmp_path / "linear", target_parameters=["proj.weight"])
    with pytest.raises(SurgeryError, match=r"PSG506: .*'proj.weight', which is no stack"):
        ps.from_peft(ps.capture(module, (x,)), tmp_path / "linear")
    module = layer(experts=1)
    trained(module, tmp_path / "one")
    with pytest.raises(SurgeryError, match=r"PSG50[67]: "):
        ps.from_peft(ps.capture(module, (x,)), tmp_path / "one")


def test_a_stack_that_is_read_elsewhere_too_is_refused(tmp_path: Path) -> None:
    class Reads(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.mlp["experts"].down_proj.mean()

    torch.manual_seed(0)
    module = Reads(turned=False, says=False, wide=6, inner=8).eval()
    trained(module, tmp_path)
    with pytest.raises(SurgeryError, match=r"PSG507: .*'mlp.experts.down_proj' in other ways"):
        ps.from_peft(ps.capture(module, (rows(),)), tmp_path)


@pytest.mark.parametrize("held", HELD)
def test_peft_loads_what_is_written_and_computes_the_same(held: str, tmp_path: Path) -> None:
    module, x = layer(*HELD[held]), rows()
    graph = ps.capture(module, (x,))
    ours = ps.apply(graph, "lora_experts", name="mine", rank=3, alpha=5)
    ours = ps.apply(ours, "lora", name="mine", roles=None, rank=2, alpha=3)
    randomise(ours, lambda name: ".mine." in name, 0.3)
    ps.to_peft(ours, tmp_path / "both")
    theirs = PeftModel.from_pretrained(deepcopy(module), tmp_path / "both").eval()
    agrees(ps.from_peft(graph, tmp_path / "both"), theirs, x, 3)
    theirs = PeftModel.from_pretrained(deepcopy(module), tmp_path / "both").eval()
    agrees(ours, theirs, x, 3)


def test_one_stack_alone_is_written_as_peft_writes_it(tmp_path: Path) -> None:
    module, x = layer(), rows()
    for parameters in (STACKS[:1], STACKS[1:], STACKS):
        trained(module, tmp_path / "theirs", target_parameters=parameters, r=4, use_rslora=True)
        ours = ps.from_peft(ps.capture(module, (x,)), tmp_path / "theirs")
        ps.to_peft(ours, tmp_path / "ours")
        folders = (tmp_path / "theirs", tmp_path / "ours")
        theirs, mine = (load_file(folder / "adapter_model.safetensors") for folder in folders)
        assert theirs.keys() == mine.keys()
        assert all(torch.equal(value.float(), mine[key]) for key, value in theirs.items())
        said, own = (json.loads((f / "adapter_config.json").read_text()) for f in folders)
        for key in ("r", "lora_alpha", "use_rslora", "target_modules"):
            assert said[key] == own[key]
        assert set(said["target_parameters"]) == set(own["target_parameters"])


SCALES = """
name: scales
with: {rank: 2, alpha: 2}
rules:
  - match: experts
    params: {s: {shape: [out], init: ones}}
    rewrite: y * s
    checkpoint: {peft: {s: lora_A.weight}}
checkpoint: {peft: {peft_type: LORA, r: rank, lora_alpha: alpha}}
"""
UNWRITTEN: dict[str, tuple[Callable[[ps.GraphModel], Any], str]] = {
    "dropout": (
        lambda graph: ps.apply(graph, "lora_experts", dropout=0.1),
        "PSG510: .*has lora_dropout = 0.1",
    ),
    "biases": (
        lambda graph: ps.apply(graph, "lora_experts", train=["proj.bias"]),
        "PSG510: .*has bias = 'all'",
    ),
    "other parameters": (
        lambda graph: ps.apply(graph, ps.parse_rules(SCALES)),
        "PSG510: .*by other parameters than two factors",
    ),
    "another file": (lambda graph: ps.apply(graph, "lora_all"), "PSG510: .*no form in peft"),
}


@pytest.mark.parametrize("case", UNWRITTEN)
def test_what_peft_has_not_at_stacks_is_not_written(
    case: str, tmp_path: Path, captured: ps.GraphModel
) -> None:
    make, pattern = UNWRITTEN[case]
    ours = make(captured)
    with pytest.raises(SurgeryError, match=pattern):
        ps.to_peft(ours, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_program_that_takes_plain_lora_is_given_no_stacks(
    tmp_path: Path, captured: ps.GraphModel
) -> None:
    ours = ps.apply(captured, "lora_experts")
    with pytest.raises(SurgeryError, match=r"PSG520: .*target_parameters"):
        ps.export_adapter(ours, tmp_path / "ours", "vllm")
    assert not (tmp_path / "ours").exists()


def test_a_loop_over_the_matrices_of_a_stack_has_one_adapter(tmp_path: Path) -> None:
    class Loop(Experts):
        def forward(self, x: Tensor) -> Tensor:
            pairs = zip(self.gate_up_proj, self.down_proj, strict=True)
            return sum(F.linear(F.linear(x, up).tanh(), down) for up, down in pairs)

    torch.manual_seed(0)
    module, x = layer(), rows()
    module.mlp["experts"] = Loop(turned=False, says=False, wide=6, inner=8).eval()
    theirs = trained(module, tmp_path / "theirs")
    ours = ps.from_peft(ps.capture(module, (x,)), tmp_path / "theirs")
    ps.to_peft(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(deepcopy(module), tmp_path / "ours").eval()
    torch.testing.assert_close(again(x), theirs(x), rtol=0, atol=1e-6)
    agrees(ours, theirs, x, 2)


def test_square_stacks_are_written_where_every_version_reads_them_alike(tmp_path: Path) -> None:
    x = rows()
    for turned, says, fine in ((True, True, True), (True, False, False), (False, False, False)):
        module = layer(turned, says, inner=6)
        ours = ps.apply(ps.capture(module, (x,)), "lora_experts", rank=2)
        randomise(ours, lambda name: "lora_experts" in name, 0.3)
        if fine:
            ps.to_peft(ours, tmp_path / "ours")
            theirs = PeftModel.from_pretrained(deepcopy(module), tmp_path / "ours").eval()
            agrees(ours, theirs, x, 2)
        else:
            with pytest.raises(SurgeryError, match=r"PSG510: .*square matrices"):
                ps.to_peft(ours, tmp_path / "ours")


# architecture, config beside the sizes, implementation
MODELS: list[tuple[str, dict[str, Any], str | None]] = [
    ("Mixtral", FOUR, "grouped_mm"),
    ("Mixtral", FOUR, "batched_mm"),
    ("Qwen3Moe", {**CHOICE, "head_dim": 8, "moe_intermediate_size": 20}, "grouped_mm"),
    ("GptOss", {**FOUR, "head_dim": 8, "intermediate_size": 24}, "grouped_mm"),
    ("Llama4Text", {**FOUR, "head_dim": 8, "intermediate_size_mlp": 40}, None),
]


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "config", "implementation"), MODELS)
def test_mixtures_compute_merge_and_are_written_as_in_peft(
    architecture: str, config: dict[str, Any], implementation: str | None, tmp_path: Path
) -> None:
    module = built(architecture, config, implementation)
    loop = deepcopy(module)
    if implementation is not None:
        loop.set_experts_implementation("eager")  # the others take no double precision
    trained(loop, tmp_path / "theirs", target_modules=["q_proj", "v_proj"])
    theirs = PeftModel.from_pretrained(loop, tmp_path / "theirs").eval()
    ours, ids = ps.from_peft(ps.capture(module), tmp_path / "theirs"), torch.randint(3, 60, (2, 7))
    ps.to_peft(ours, tmp_path / "ours")
    ours = ours.double()
    wanted = theirs(input_ids=ids).last_hidden_state
    found = ours(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    merged, folded = theirs.merge_and_unload().state_dict(), ps.fold(ours).state_dict()
    assert sum(not torch.equal(merged[n], v) for n, v in module.state_dict().items()) == 4
    for name, value in merged.items():
        torch.testing.assert_close(folded[name], value, rtol=0, atol=1e-6)
    files = (tmp_path / name / "adapter_model.safetensors" for name in ("theirs", "ours"))
    given, written = map(load_file, files)
    assert given.keys() == written.keys()
    assert all(torch.equal(value.float(), written[key]) for key, value in given.items())
