"""What was done to a model by hand is what the difference says, in the headline and the changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peftsurgery as ps
from peftsurgery.diff.comparison import Diff, diff
from tests.diff.models import HEADS, WIDTH, Layer, Recipe, build, captured
from tests.models.stepping import Windowed

PLAIN = Layer()
MIDDLE = {
    "act": (replace(PLAIN, act="gelu"), ["~ layers.1.mlp.act: silu → gelu"]),
    "width": (replace(PLAIN, hidden=20), [
        "~ layers.1.mlp.up: linear: out 12 → 20",
        "~ layers.1.mlp.down: linear: in 12 → 20",
        "~ layers.1: 2 nodes (linear, silu) of another size",
        "~ layers.1.mlp.up.weight: [12, 8] → [20, 8]",
        "~ layers.1.mlp.up.bias: [12] → [20]",
        "~ layers.1.mlp.down.weight: [8, 12] → [8, 20]",
    ]),
    "no norm": (replace(PLAIN, norm="none"), [
        "- layers.1.ln: norm",
        "~ layers.1.attn.o: residual after attention: norm pre → -",
        "- layers.1.ln: 1 node (layer_norm)",
        "~ layers.1.attn.q: other operands: linear",
        "~ layers.1.attn.k: other operands: linear",
        "~ layers.1.attn.v: other operands: linear",
        "- layers.1.ln.weight: parameter float32[8]",
        "- layers.1.ln.bias: parameter float32[8]",
    ]),
}  # fmt: skip


def changed(middle: Layer) -> Recipe:
    return Recipe((PLAIN, middle, PLAIN))


def told(found: Diff) -> list[str]:
    return [str(line) for line in found.summary.lines]


@pytest.mark.parametrize("what", MIDDLE)
def test_a_change_of_one_layer_is_told_of_that_layer(what: str) -> None:
    layer, expected = MIDDLE[what]
    found = diff(captured(), captured(changed(layer)))
    assert sorted(told(found)) == sorted(expected)
    assert found.summary.differs == {"structure": True, "config": False, "weights": False}


def test_a_wider_layer_costs_what_arithmetic_says() -> None:
    found = diff(captured(), captured(changed(replace(PLAIN, hidden=20))))
    a, b = found.summary.figures
    more = 20 - 12
    assert b.parameters - a.parameters == more * (2 * WIDTH + 1)
    tokens = 2 * 5
    assert b.flops is not None
    assert a.flops is not None
    assert b.flops - a.flops == 2 * tokens * WIDTH * more * 2
    assert b.activation_bytes is not None
    assert a.activation_bytes is not None
    assert b.activation_bytes - a.activation_bytes == 4 * tokens * more * 2


def test_flops_and_parameters_are_those_of_the_textbook() -> None:
    figures = diff(captured(), captured()).summary.figures[0]
    tokens, seq = 10, 5
    linears = 4 * WIDTH * WIDTH + 2 * 12 * WIDTH
    attention = 2 * 2 * (2 * HEADS * seq * seq * (WIDTH // HEADS))
    assert figures.flops == 3 * (2 * tokens * linears + attention) + 2 * tokens * WIDTH * 11
    assert figures.parameters == sum(p.numel() for p in build().parameters())


def test_what_a_loop_does_is_counted_in_every_turn() -> None:
    graph = ps.capture(Windowed().eval(), {"x": torch.randn(2, 9, 4)})
    figures = diff(graph, graph).summary.figures[0]
    windows = 2 * 5 * (2 * 2 * 4 * 4 * 2)  # two products of (2, 4) with (4, 4) and with itself
    assert figures.flops == windows + 2 * (2 * 18 * 4 * 4)


class Positions(torch.nn.Module):
    """Adds to each token what is learnt for its place, of which there are 8."""

    def __init__(self) -> None:
        super().__init__()
        self.places = torch.nn.Parameter(torch.ones(8, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.places[: x.shape[1]]


def test_a_shape_that_the_model_does_not_run_at_is_refused() -> None:
    graph = ps.capture(Positions(), inputs={"x": torch.ones(2, 5, WIDTH)})
    found = diff(graph, graph, shape=(3, 8)).summary.figures
    assert found is not None
    assert found[0].activation_bytes == 3 * 8 * WIDTH * 4
    with pytest.raises(ps.SurgeryError) as refused:
        diff(graph, graph, shape=(3, 9))
    assert refused.value.code == "PSG904"


A_LAYER = 4 * WIDTH * (WIDTH + 1) + 12 * (2 * WIDTH + 1) + WIDTH + 2 * WIDTH
HEADLINES = {  # the change of parameters and bytes, by arithmetic; None: half of them
    "act": (changed(replace(PLAIN, act="gelu")), 0, 0),
    "no norm": (changed(replace(PLAIN, norm="none")), -2 * WIDTH, -4 * 2 * WIDTH),
    "moved norm": (changed(replace(PLAIN, norm="after")), 0, 0),
    "mask": (changed(replace(PLAIN, causal=False)), 0, 0),
    "one more": (Recipe((PLAIN,) * 4), A_LAYER, 4 * A_LAYER),
    "dtype": (Recipe(dtype=torch.bfloat16), 0, None),
}


@pytest.mark.parametrize("what", HEADLINES)
def test_the_headline_says_what_an_edit_cost(what: str) -> None:
    recipe, parameters, size = HEADLINES[what]
    found = diff(captured(), captured(recipe))
    assert found.summary.figures is not None
    a, b = found.summary.figures
    assert b.parameters - a.parameters == b.trainable - a.trainable == parameters
    assert b.bytes - a.bytes == (-a.bytes // 2 if size is None else size)
    assert a.flops is not None
    if what == "one more":
        assert (b.flops or 0) - a.flops == (a.flops - 2 * 10 * WIDTH * 11) / 3
    else:
        assert b.flops == a.flops
    shown = {name: row for name, *row in found.summary.headline()}
    assert (shown["parameters"][2] == "=") is (parameters == 0)


def test_a_moved_norm_is_moved_and_not_new() -> None:
    lines = told(diff(captured(), captured(changed(replace(PLAIN, norm="after")))))
    assert lines
    assert not [line for line in lines if line[0] in "+-"]
    assert "~ layers.1.ln: other operands: layer_norm" in lines


@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_layer_put_in_is_one_insertion(place: int) -> None:
    layers = [PLAIN] * 3
    layers.insert(place, replace(PLAIN, act="gelu"))
    found = diff(captured(), captured(Recipe(tuple(layers))))
    blocks = [line for line in found.summary.lines if line.part == "block"]
    added = [line.where for line in blocks if line.sign == "+"]
    assert added == [f"layers.{place}"]
    moved = [line for line in blocks if line.sign == ">"]
    assert sum(line.count for line in moved) == 3 - place
    assert {line.text for line in moved} <= {"moved by +1"}
    assert len(found.summary.lines) == len(blocks)
    assert not [line for line in found.summary.lines if line.sign == "-"]


def test_a_layer_taken_out_mirrors_one_put_in() -> None:
    more = Recipe((PLAIN, replace(PLAIN, act="gelu"), PLAIN, PLAIN))
    there, back = diff(captured(), captured(more)), diff(captured(more), captured())
    signs = {"+": "-", "-": "+", "~": "~", ">": ">"}
    assert sorted(signs[line.sign] for line in there.summary.lines) == sorted(
        line.sign for line in back.summary.lines
    )


def test_a_duplicated_layer_is_one_more() -> None:
    found = diff(captured(), captured(Recipe((PLAIN,) * 4)))
    blocks = [str(line) for line in found.summary.lines if line.part == "block"]
    assert blocks == told(found) == ["+ layers.3: block Block (35 nodes)"]


def test_layers_that_changed_places_have_moved_and_not_changed() -> None:
    wide, gelu = replace(PLAIN, hidden=20), replace(PLAIN, act="gelu")
    found = diff(captured(Recipe((PLAIN, gelu, wide))), captured(Recipe((PLAIN, wide, gelu))))
    assert sorted(told(found)) == ["> layers.1: moved by +1", "> layers.2: moved by -1"]
    assert found.summary.figures is not None
    a, b = found.summary.figures
    assert (a.parameters, a.flops, a.nodes) == (b.parameters, b.flops, b.nodes)


REVISIONS = {"num_key_value_heads": 4}, {"num_key_value_heads": 2, "rms_norm_eps": 1e-3}


def test_another_revision_of_an_architecture_is_told_by_config_sites_and_shapes() -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    configs = [LlamaConfig(**sizes, num_attention_heads=4, **each) for each in REVISIONS]
    found = diff(*(ps.capture(LlamaForCausalLM(config).eval()) for config in configs))
    lines = told(found)
    assert "~ config.num_key_value_heads: 4 → 2" in lines
    assert "~ config.rms_norm_eps: 1e-06 → 0.001" in lines
    assert "~ model.layers.{0..1}.self_attn: attention: kv_heads 4 → 2 ×2" in lines
    for part in "kv":
        name = f"model.layers.{{0..1}}.self_attn.{part}_proj"
        assert f"~ {name}: linear: out 16 → 8 ×2" in lines
        assert f"~ {name}.weight: [16, 16] → [8, 16] ×2" in lines
    norms = [line for line in lines if "add(%0, 1e-06)" in line]
    assert norms == [
        *(
            f"~ model.layers.{{0..1}}.{norm}: add(%0, 1e-06) → (%0, 0.001) ×2"
            for norm in ("input_layernorm", "post_attention_layernorm")
        ),
        "~ model.norm: add(%0, 1e-06) → (%0, 0.001)",
    ]
    assert found.summary.figures is not None
    a, b = found.summary.figures
    # two layers, keys and values, 8 rows of 16 fewer
    assert a.parameters - b.parameters == 2 * 2 * 8 * 16


def test_an_untied_head_is_told() -> None:
    found = diff(captured(), captured(Recipe(tied=False)))
    assert told(found) == ["~ head.weight: untied: a weight of its own"]
    assert found.summary.figures[1].parameters - found.summary.figures[0].parameters == 11 * WIDTH


def test_a_mask_that_went_missing_is_told() -> None:
    lines = told(diff(captured(), captured(changed(replace(PLAIN, causal=False)))))
    assert any("scaled_dot_product_attention" in line for line in lines)
    assert any("causal True → False" in line for line in lines)
    assert all("layers.1.attn" in line for line in lines)


def test_a_fused_projection_that_was_split_is_told_by_its_sites() -> None:
    fused = Recipe((replace(PLAIN, fused=True),) * 3)
    found = diff(captured(fused), captured())
    sites = [str(line) for line in found.summary.lines if line.part == "site"]
    for part in "qkv":
        assert f"+ layers.{{0..2}}.attn.{part}: linear attn.{part} ×3" in sites
    assert found.summary.figures[0].parameters == found.summary.figures[1].parameters
    assert [line for line in told(found) if line[0] in "+-" and "parameter" in line] == []
    assert "~ layers.{0..2}.attn.qkv.weight: split into q, k, v ×3" in told(found)
    assert "~ layers.{0..2}.attn.qkv.weight: made of q, k, v ×3" in told(
        diff(captured(), captured(fused))
    )


def test_another_dtype_is_told_of_every_tensor_and_of_nothing_else() -> None:
    lines = diff(captured(), captured(Recipe(dtype=torch.bfloat16))).summary.lines
    (tensor,) = [str(line) for line in lines if line.part == "tensor"]
    every = len(build().state_dict())
    assert tensor == f"~ (model): float32 → bfloat16: all {every} tensors that were float32"
    assert not [line for line in lines if line.sign != "~"]


def test_an_adapter_in_all_layers_but_one_names_the_exception() -> None:
    graph = captured(Recipe((PLAIN,) * 6))
    rule = """
name: thin
with: {rank: 2}
rules:
  - match: linear
    where: {role: attn.q, any: [{layers: "0..2"}, {layers: "4.."}]}
    params: {A: {shape: [rank, in]}, B: {shape: [out, rank], init: zeros}}
    rewrite: y + linear(linear(x, A), B)
"""
    found = diff(graph, ps.apply(graph, ps.parse_rules(rule)))
    assert "+ layers.{0..2,4..5}.attn.q: thin(rank 2) on attn.q ×5" in told(found)
    assert found.summary.figures is not None
    a, b = found.summary.figures
    assert b.parameters - a.parameters == b.trainable == 5 * 2 * (WIDTH + WIDTH)


def test_renaming_all_modules_changes_names_only() -> None:
    layer = replace(PLAIN, names=("first", "second", "third"))
    other = Recipe((layer,) * 3, names=("table", "stack", "out"))
    found = diff(captured(), captured(other))
    assert {line.sign for line in found.summary.lines} == {">"}
    assert "> stack.{0..2}.second: was attn ×3" in told(found)
    assert not [line for line in told(found) if ".second.q" in line]  # it follows
    graphs = found.script.graphs if found.script else ()
    assert {kind for each in graphs for e in each.edits for kind in e.kinds} == {"renamed"}
    a, b = (replace(figures, at="") for figures in found.summary.figures or ())
    assert a == b


class Within(torch.nn.Module):
    """A model as a part of another."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build()

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.inner(ids)
        return logits, logits.argmax(-1)


def test_a_model_that_became_a_part_of_another_is_told_by_its_outermost_module() -> None:
    within = ps.capture(Within().eval(), inputs={"ids": torch.zeros(2, 5, dtype=torch.long)})
    assert sorted(told(diff(captured(), within))) == sorted(
        [
            "> layers.{0..2}: now in inner.layers ×3",
            "> inner.embed: was embed",
            "> inner.head: was head",
            "+ (model): 1 node (argmax)",
            "~ (model): output((%0,)) → ((%0, %1))",
        ]
    )


def test_an_operated_model_compares_itself_with_its_base() -> None:
    graph = captured()
    operated = ps.apply(ps.apply(graph, "lora_qv"), "ia3")
    assert told(operated.diff()) == told(diff(graph, operated))
    assert any(": ia3 on" in line for line in told(operated.diff()))
    operated.choose("lora_qv")
    assert told(operated.diff()) == told(diff(graph, ps.apply(graph, "lora_qv")))
    operated.choose()
    (line,) = told(operated.diff())
    assert line.startswith("~ (model): frozen: all")


def test_an_ejected_model_is_the_one_it_was() -> None:
    graph = captured()
    assert not diff(graph, ps.eject(ps.apply(graph, "lora_qv")))
    assert not diff(graph, captured())
