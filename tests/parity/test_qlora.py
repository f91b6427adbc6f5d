"""QLoRA: a base in four bits, with peft on transformers' bitsandbytes model as the oracle.

The oracle stays in train mode (there is no dropout): in eval, bitsandbytes' layers repack their
weights for processors with AVX-512 and do not accept layers as narrow as these.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers
from peft import PeftModel
from torch import nn
from transformers import BitsAndBytesConfig

import peftsurgery as ps
from peftsurgery.errors import SurgeryError
from peftsurgery.surgery.fourbit import pack as packing
from peftsurgery.surgery.model.operated import OperatedModel
from tests.parity.models import SMALL, base, batch, captured, randomise
from tests.parity.training import logits, train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NAMES = ("llama", "qwen3", "bert", "t5", "gpt2")
# transformers leaves the second feed-forward layer of T5 in full precision
KEPT: dict[str, Any] = {"t5": {"but": ["lm_head", "ffn.down"]}}


def adapted(name: str, **settings: Any) -> OperatedModel:
    settings = {"rank": 4, "alpha": 6, **KEPT.get(name, {}), **settings}
    ours = ps.apply(captured(name), "qlora", **settings)
    randomise(ours, lambda parameter: parameter.endswith((".A", ".B")))
    return ours.eval()


def quantised(name: str, folder: Path, double: bool = True, **settings: Any) -> Any:
    """The model as transformers loads it with bitsandbytes."""
    base(name).save_pretrained(folder)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        **{"bnb_4bit_compute_dtype": torch.float32, **settings},
    )

    kind = getattr(transformers, SMALL[name].model)
    return kind.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def pair(name: str, folder: Path, **settings: Any) -> tuple[OperatedModel, Any]:
    """The same adapter on the same base in four bits, here and in peft."""
    ours = adapted(name, **settings)
    ps.to_peft(ours, folder / "adapter")
    theirs = PeftModel.from_pretrained(
        quantised(name, folder / "base", settings.get("double", True)),
        folder / "adapter",
        is_trainable=True,
    )
    return ours, theirs.train()


@pytest.mark.parametrize("name", NAMES)
def test_outputs_gradients_and_losses_are_pefts(name: str, tmp_path: Path) -> None:
    ours, theirs = pair(name, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-6)
    assert (logits(ours) - logits(captured(name))).abs().max() > 1e-3
    for model in (ours, theirs):
        model.zero_grad()
        model(**batch()).loss.backward()
    seen = 0
    for key, parameter in theirs.named_parameters():
        letter = "A" if "lora_A" in key else "B"
        module = key.removeprefix("base_model.model.").partition(".lora_")[0]
        if parameter.requires_grad:
            mine = ours.get_parameter(f"{module}.qlora.{letter}")
            torch.testing.assert_close(mine.grad, parameter.grad, rtol=0, atol=1e-5)
            seen += 1
    assert seen == sum(p.requires_grad for p in ours.parameters())
    losses = [train(deepcopy(model).train()) for model in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_one_quantisation_of_scales_or_two(tmp_path: Path) -> None:
    ours, theirs = pair("llama", tmp_path, double=False)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-6)


def test_products_are_computed_in_the_dtype_asked_for(tmp_path: Path) -> None:
    ours = adapted("llama", compute="bfloat16", exact=True)
    ps.to_peft(ours, tmp_path / "adapter")
    model = quantised("llama", tmp_path / "base", bnb_4bit_compute_dtype=torch.bfloat16)
    theirs = PeftModel.from_pretrained(model, tmp_path / "adapter").train()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-6)
    assert not torch.allclose(logits(ours), logits(adapted("llama")), atol=1e-5)


def size(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def test_the_base_is_kept_in_four_bits(tmp_path: Path) -> None:
    base("bert").save_pretrained(tmp_path / "base")
    graph: Any = ps.capture(str(tmp_path / "base"))
    ours = ps.apply(graph, "nf4")
    logits(ours)
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    packed = ours.get_parameter(name)
    numbers = 32 * 48
    assert packed.dtype == torch.uint8
    assert packed.numel() == numbers // 2 + numbers // 64 + 4 + 4, "4 bits, scales, their scale"
    stored = sum(4 * captured("bert").get_parameter(each).numel() for each in ours.stored)
    assert size(ours) == size(captured("bert")) - stored + sum(
        ours.get_parameter(each).numel() for each in ours.stored
    )
    assert graph.get_parameter(name).is_meta, "nothing else holds the dense weights"
    assert ours.source._loaded is None
    assert ours.report.total == ps.apply(captured("bert"), "lora_qv", rank=1).report.total - 4 * 64
    assert ps.eject(ours) is graph
    assert torch.equal(logits(ps.eject(ours)), logits(captured("bert")))


def test_no_dense_weight_outlives_its_product() -> None:
    ours = adapted("llama").train()
    shapes = {tuple(captured("llama").get_parameter(name).shape) for name in ours.stored}
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = ours(**batch()).loss
    assert loss.requires_grad
    assert any(t.dtype == torch.uint8 for t in kept)
    assert not any(
        tuple(t.shape) in shapes or tuple(t.T.shape) in shapes for t in kept if t.ndim == 2
    )


def test_the_fold_adds_to_what_was_unpacked_and_says_its_error(tmp_path: Path) -> None:
    ours, theirs = pair("llama", tmp_path)
    torch.testing.assert_close(logits(ps.fold(ours)), logits(ours), rtol=0, atol=2e-6)
    exact = ps.fold_error(ours)
    assert exact.weights == 14
    assert exact.largest == 0, "the base is in fp32, and so is the sum"
    merged = theirs.merge_and_unload()
    again = ps.fold(ours, requantise=True)
    gaps = []
    for name in ours.stored:
        mine, other = (
            dense(m.get_submodule(name.removesuffix(".weight"))) for m in (again, merged)
        )
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)
        gaps.append((mine - ps.fold(ours).get_parameter(name)).abs())
    error = ps.fold_error(ours, requantise=True)
    assert error.largest == pytest.approx(max(float(gap.max()) for gap in gaps), rel=1e-4)
    total = sum(float(gap.sum()) for gap in gaps)
    assert error.mean == pytest.approx(total / sum(gap.numel() for gap in gaps), rel=1e-4)
    assert "14 weights" in str(error)
    torch.testing.assert_close(logits(again.train()), logits(merged.train()), rtol=0, atol=1e-5)


def test_what_transformers_keeps_in_full_precision_is_not_requantised() -> None:
    adapted_everywhere = ps.apply(captured("t5"), "nf4", but="lm_head")
    error = refusal(lambda: ps.fold(adapted_everywhere, requantise=True))
    assert error.code == "PSG406"
    assert "T5ForConditionalGeneration" in error.message
    ps.fold(ps.apply(captured("t5"), "nf4", **KEPT["t5"]), requantise=True)


def dense(layer: Any) -> torch.Tensor:
    weight: torch.Tensor = bnb.functional.dequantize_4bit(
        layer.weight.data, layer.weight.quant_state
    )
    return weight


def test_only_the_adapter_is_saved_and_loading_packs_the_base_again(tmp_path: Path) -> None:
    ours = adapted("gpt2")
    ours.save(tmp_path)
    assert {name.rpartition(".")[2] for name in ours.learnt()} == {"A", "B"}
    assert torch.equal(logits(ps.load(tmp_path, captured("gpt2"))), logits(ours))


def test_any_method_goes_on_a_quantised_base_and_off_it(tmp_path: Path) -> None:
    quantised_graph = ps.apply(captured("llama"), "nf4")
    lora = adapted("llama")
    ps.to_peft(lora, tmp_path)
    assert torch.equal(logits(ps.from_peft(quantised_graph, tmp_path).eval()), logits(lora))
    dora = ps.apply(quantised_graph, "dora").eval()
    torch.testing.assert_close(logits(dora), logits(quantised_graph), rtol=0, atol=1e-6)
    randomise(dora, lambda name: name.endswith((".A", ".B", ".m")))
    torch.testing.assert_close(logits(ps.fold(dora)), logits(dora), rtol=0, atol=5e-6)
    plain = ps.eject(dora, "nf4")
    assert all(p.is_floating_point() for p in plain.parameters())
    dora.deactivate("dora")
    assert torch.equal(logits(dora), logits(quantised_graph)), "the base stays as it is kept"


def test_a_cast_model_reads_its_packed_weights_in_the_new_dtype() -> None:
    ours = deepcopy(ps.apply(captured("llama"), "nf4")).eval()
    before = logits(ours)
    ours.to(torch.bfloat16)
    assert {p.dtype for p in ours.parameters()} == {torch.uint8, torch.bfloat16}
    torch.testing.assert_close(logits(ours).float(), before, rtol=0, atol=0.05)
    assert logits(ours).dtype == torch.bfloat16


def refusal(make: Callable[[], Any]) -> SurgeryError:
    with pytest.raises(SurgeryError) as caught:
        make()
    return caught.value


def rule(text: str) -> Any:
    return ps.parse_rules(f"name: t\nrules:\n  - {{{text}}}\n")


@pytest.mark.slow
def test_weights_that_have_no_four_bit_form_are_refused() -> None:
    gpt2, bert = captured("gpt2"), captured("bert")
    part = rule("match: linear, where: {role: attn.q}, store: nf4()")
    assert "part" in refusal(lambda: ps.apply(gpt2, part)).message
    vector = rule("match: norm, store: nf4()")
    assert refusal(lambda: ps.apply(bert, vector)).code == "PSG325"
    double = ps.capture(base("bert").double(), inputs=batch(2, 5))
    assert "float64" in refusal(lambda: ps.apply(double, "nf4")).message
    broken = base("bert")
    broken.bert.encoder.layer[0].output.dense.weight.data[0, 0] = float("nan")
    assert refusal(lambda: ps.apply(ps.capture(broken, inputs=batch(2, 5)), "nf4")).code == "PSG325"
    trained = rule("match: parameter, where: {kind: weight}, train: true")
    assert refusal(lambda: ps.apply(bert, ["nf4", trained])).code == "PSG325"
    other = ps.apply(bert, "nf4")
    assert refusal(lambda: ps.apply(other, "nf4", name="other", block=128)).code == "PSG325"


def test_settings_that_are_no_way_to_store_are_refused() -> None:
    for settings in ({"block": 100}, {"compute": "int8"}):
        assert (
            refusal(lambda given=settings: ps.apply(captured("bert"), "nf4", **given)).code
            == "PSG146"
        )
    assert (
        refusal(lambda: ps.apply(captured("bert"), rule("match: linear, store: 3"))).code
        == "PSG146"
    )
    assert refusal(lambda: rule("match: linear, store: int3()")).code == "PSG114"


def test_a_model_that_is_quantised_already_is_refused(tmp_path: Path) -> None:
    model = quantised("llama", tmp_path / "base")
    assert refusal(lambda: ps.capture(model)).code == "PSG215"
    model.save_pretrained(tmp_path / "quantised")
    assert refusal(lambda: ps.capture(str(tmp_path / "quantised"))).code == "PSG215"


def test_without_bitsandbytes_the_hint_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packing.bitsandbytes.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    error = refusal(lambda: ps.apply(captured("bert"), "qlora"))
    assert error.code == "PSG326"
    assert "peftsurgery[quantise]" in str(error.hint)


def test_a_base_that_was_cast_before_is_packed_as_it_is() -> None:
    graph = deepcopy(captured("llama")).to(torch.bfloat16).eval()
    ours = ps.apply(graph, "nf4").eval()
    torch.testing.assert_close(logits(ours), logits(graph), rtol=0, atol=1.0)
    assert logits(ours).dtype == torch.bfloat16
    assert all(stored.recipe.dtype == torch.bfloat16 for stored in ours.stored.values())


def test_gradients_are_the_same_when_blocks_are_computed_again_and_close_under_autocast() -> None:
    ours = adapted("llama").train()
    ours(**batch()).loss.backward()
    plain = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    ours.zero_grad()
    ours.gradient_checkpointing()
    ours(**batch()).loss.backward()
    assert plain
    assert all(torch.equal(ours.get_parameter(name).grad, grad) for name, grad in plain.items())
    ours.zero_grad()
    ours.gradient_checkpointing(False)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(**batch()).loss
    loss.backward()
    for name, grad in plain.items():
        torch.testing.assert_close(ours.get_parameter(name).grad, grad, rtol=0, atol=0.01)
