"""Several adapters in one model: switched on and off, saved together or alone, and taken out."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import peftsurgery as ps
from peftsurgery.surgery.model.operated import OperatedModel
from tests.models.captured import captured
from tests.models.zoo import ZOO
from tests.surgery.reference import randomise

BIASES = ps.Rule(match="parameter", where={"kind": "bias"}, train=True)


def logits(model: torch.nn.Module, **more: object) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**ZOO["bert"].inputs(4, 6), **more).logits
    return result


def lora(name: str, seed: int, rules: str = "lora_qv") -> OperatedModel:
    return randomise(ps.apply(captured("bert"), rules, name=name, rank=3), seed, scale=0.3)


def biases(name: str, seed: int) -> OperatedModel:
    return randomise(ps.apply(captured("bert"), BIASES, name=name), seed, scale=0.3)


@pytest.fixture(autouse=True, params=["bert"])
def name(request: pytest.FixtureRequest) -> str:
    """The model most tests here are of: they run where it is captured already."""
    return str(request.param)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Four adapters, each saved, with the logits of a model that has it alone."""
    made = {"a": lora("a", 1), "b": lora("b", 2, "lora_attention")}
    made |= {"c": biases("c", 3), "d": biases("d", 4)}
    found = {}
    for name, model in made.items():
        folder = tmp_path_factory.mktemp(name)
        model.save(folder)
        found[name] = (folder, logits(model))
    return found


@pytest.fixture
def four(alone: dict[str, tuple[Path, torch.Tensor]]) -> OperatedModel:
    """All four adapters in one model, none of them active."""
    model = captured("bert")
    for folder, _ in alone.values():
        model = ps.load(folder, model)
        model.deactivate()
    return model


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_each_alone_computes_what_a_model_with_only_that_one_does(
    four: OperatedModel, alone: dict[str, tuple[Path, torch.Tensor]]
) -> None:
    base = logits(captured("bert").requires_grad_(False))
    captured("bert").requires_grad_(True)
    assert torch.equal(logits(four), base)
    for name, (_, expected) in alone.items():
        with four.only(name):
            assert four.active == (name,)
            assert torch.equal(logits(four), expected)
            assert (expected - base).abs().max() > 1e-3
        assert torch.equal(logits(four), base)


def test_active_ones_add_up_in_the_order_they_were_applied(four: OperatedModel) -> None:
    four.activate("c")
    four.activate("b", "a")
    assert four.active == ("a", "b", "c")
    both = ps.eject(four, "d")
    assert torch.equal(logits(both), logits(four))
    four.deactivate("a")
    assert torch.equal(logits(ps.eject(both, "a")), logits(four))
    four.deactivate()
    assert four.active == ()


def test_switching_back_rewrites_nothing(four: OperatedModel) -> None:
    before = four.captures[0]
    with four.only("a"):
        first = four.captures[0]
    with four.only("b"):
        assert four.captures[0] is not first
    with four.only("a"):
        assert four.captures[0] is first
    assert four.captures[0] is before
    without = ps.eject(ps.eject(four, "c"), "d")  # with no copies of the base's parameters
    assert isinstance(without, OperatedModel)
    assert without.captures[0].top is captured("bert").captures[0].top


def test_two_copies_of_one_parameter_are_not_active_together(four: OperatedModel) -> None:
    four.activate("c")
    with pytest.raises(ps.SurgeryError, match="PSG312: 'c' and 'd' both train"):
        four.activate("d")
    assert four.active == ("c",)


def test_only_active_adapters_are_trained(four: OperatedModel) -> None:
    assert trainable(four) == set()
    four.activate("a", "c")
    assert trainable(four) == set(four.learnt("a", "c"))
    assert "bert.encoder.layer.0.attention.self.query.bias" in trainable(four)
    frozen = next(iter(four.learnt("a")))
    four.get_parameter(frozen).requires_grad_(False)
    four.deactivate("a")
    assert trainable(four) == set(four.learnt("c"))
    again = ps.eject(four, "b")
    for model in (four, again):
        model.activate("a")
        assert trainable(model) == set(model.learnt("a", "c")) - {frozen}
        model.zero_grad()
        model(**ZOO["bert"].inputs(2, 6)).logits.square().mean().backward()
        reached = {name for name, p in model.named_parameters() if p.grad is not None}
        assert reached == trainable(model)


def test_an_optimizer_step_changes_the_active_adapter_alone(four: OperatedModel) -> None:
    four.activate("c")
    before = {name: value.clone() for name, value in four.learnt().items()}
    optimizer = torch.optim.AdamW((p for p in four.parameters() if p.requires_grad), lr=0.1)
    four(**ZOO["bert"].inputs(2, 6)).logits.square().mean().backward()
    optimizer.step()
    four.deactivate()
    changed = {
        name for name, value in four.learnt().items() if not torch.equal(value, before[name])
    }
    assert changed == set(four.learnt("c"))
    assert torch.equal(logits(four), logits(ps.eject(four)))


def test_what_is_inactive_is_saved_and_loaded_too(
    four: OperatedModel, tmp_path: Path, alone: dict[str, tuple[Path, torch.Tensor]]
) -> None:
    four.activate("b", "d")
    four.save(tmp_path / "all")
    again = ps.load(tmp_path / "all", captured("bert"))
    assert (again.adapters, again.active) == (("a", "b", "c", "d"), ("b", "d"))
    assert torch.equal(logits(again), logits(four))
    again.deactivate("b", "d")
    again.activate("c")
    assert torch.equal(logits(again), alone["c"][1])
    four.save(tmp_path / "some", names=["d", "a"])
    some = ps.load(tmp_path / "some", captured("bert"))
    assert (some.adapters, some.active) == (("a", "d"), ("d",))
    assert set(load_file(tmp_path / "some/adapter.safetensors")) == set(four.learnt("a", "d"))


def test_a_name_that_is_taken_or_unknown_is_refused(
    four: OperatedModel, tmp_path: Path, alone: dict[str, tuple[Path, torch.Tensor]]
) -> None:
    with pytest.raises(ps.SurgeryError, match=r"PSG304: .*'a' already\n.*eject"):
        ps.load(alone["a"][0], four)
    for act in (four.activate, four.deactivate, lambda name: four.save(tmp_path, names=[name])):
        with pytest.raises(ps.SurgeryError, match="PSG310: there is no adapter 'e'"):
            act("e")


def test_fold_and_peft_take_what_is_active(four: OperatedModel, tmp_path: Path) -> None:
    base = ZOO["bert"].build()
    for name, value in ps.fold(four).named_parameters():
        assert torch.equal(value, base.get_parameter(name))
    four.activate("b", "c")
    torch.testing.assert_close(logits(ps.fold(four)), logits(four), rtol=0, atol=1e-5)
    four.activate("a")
    ps.to_peft(four, tmp_path, name="a")
    only = ps.from_peft(captured("bert"), tmp_path)
    with four.only("a"):
        torch.testing.assert_close(logits(only), logits(four), rtol=0, atol=1e-6)


@pytest.mark.parametrize("then", [(), ("b", "d")])
def test_a_state_dict_is_read_whatever_was_active(
    four: OperatedModel, then: tuple[str, ...]
) -> None:
    four.activate("a", "c")
    state = {name: value.clone() for name, value in four.state_dict().items()}
    twin = copy.deepcopy(four)
    twin.deactivate()
    randomise(twin, seed=9)
    if then:
        twin.activate(*then)
    base = {name: value.clone() for name, value in captured("bert").named_parameters()}
    assert not torch.equal(logits(twin), logits(four))
    twin.load_state_dict(state)
    for name, value in four.learnt().items():
        assert torch.equal(twin.learnt()[name], value)
    twin.load_state_dict({**state, **{name: value + 1 for name, value in base.items()}})
    assert all(torch.equal(captured("bert").get_parameter(name), base[name]) for name in base)


def test_a_copy_is_switched_by_itself_and_modes_are_everybodys(four: OperatedModel) -> None:
    four.activate("a")
    expected = logits(four)
    twin = copy.deepcopy(four)
    twin.deactivate("a")
    twin.activate("c")
    assert four.active == ("a",)
    assert torch.equal(logits(four), expected)
    randomise(twin, seed=9)
    assert torch.equal(logits(four), expected)
    four.train()
    assert all(part.training for part in four.modules())
    four.eval()
    assert torch.equal(logits(four.to(torch.float64).float()), expected)


def test_the_report_and_the_print_say_what_is_active(four: OperatedModel) -> None:
    four.activate("a")
    assert "adapters: a, b (inactive), c (inactive), d (inactive)" in str(four.report)
    assert "adapters: a, b (inactive), c (inactive), d (inactive)" in repr(four)
    assert four.report.to_dict()["active"] == ["a"]
    assert four.report.trainable == sum(value.numel() for value in four.learnt("a").values())


def test_a_model_without_weights_yet_trains_its_copies(tmp_path: Path) -> None:
    ZOO["bert"].build().save_pretrained(tmp_path)
    operated = ps.apply(ps.capture(str(tmp_path)), BIASES, name="c")
    parameters = dict(operated.named_parameters())
    expected = logits(ZOO["bert"].build().requires_grad_(False))
    assert torch.equal(logits(operated), expected)
    assert all(operated.get_parameter(name) is p for name, p in parameters.items())
    randomise(operated)
    assert not torch.equal(logits(operated), expected)
    operated.deactivate()
    assert torch.equal(logits(operated), expected)
