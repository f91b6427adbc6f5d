"""The bottleneck family against forward hooks on the original, on seven architectures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import peftsurgery as ps
from peftsurgery.surgery.model.operated import OperatedModel
from tests.capture.test_generation import original, remembering, tokens
from tests.models.captured import captured
from tests.models.zoo import ZOO
from tests.surgery.bottlenecks import MODELS, Norm, leaves, readout, rewritten, under
from tests.surgery.reference import losses_of, randomise

Body = Callable[[dict[str, Tensor], Tensor, Tensor, Norm], Tensor]


@dataclass(frozen=True)
class Method:
    """A rule, the sublayers that it comes after, and what it makes of h, as published."""

    rule: str
    after: tuple[str, ...]
    body: Body
    settings: dict[str, Any]


def houlsby(p: dict[str, Tensor], h: Tensor, x: Tensor, norm: Norm) -> Tensor:
    inner = h @ p["D"].T + p["bd"]
    return h + inner * torch.sigmoid(inner) @ p["U"].T + p["bu"]


def pfeiffer(p: dict[str, Tensor], h: Tensor, x: Tensor, norm: Norm) -> Tensor:
    return h + (norm(h + x) @ p["D"].T + p["bd"]).clamp(min=0) @ p["U"].T + p["bu"]


def parallel(p: dict[str, Tensor], h: Tensor, x: Tensor, norm: Norm) -> Tensor:
    return h + 4 * ((x @ p["D"].T + p["bd"]).clamp(min=0) @ p["U"].T + p["bu"])


METHODS = {
    "houlsby": Method("houlsby", ("self", "ffn"), houlsby, {}),
    "houlsby_cross": Method(
        "houlsby", ("self", "cross", "ffn"), houlsby, {"attention": ["self", "cross"]}
    ),
    "pfeiffer": Method("pfeiffer", ("ffn",), pfeiffer, {}),
    "parallel_adapter": Method("parallel_adapter", ("ffn",), parallel, {}),
}
CASES = [
    (name, method)
    for name in MODELS
    for method in METHODS
    if method != "houlsby_cross" or name in ("t5", "bart")
]


@dataclass(frozen=True)
class Case:
    """A method on a model, its parameters moved off their start."""

    name: str
    method: Method
    ours: OperatedModel

    def theirs(self, values: dict[str, Tensor], rows: int = 3, length: int = 6) -> Any:
        """What the original with hooks returns, its adapters being ``values``."""
        method, module = self.method, ZOO[self.name].build()

        def new(path: str, h: Tensor, x: Tensor, norm: Norm) -> Tensor:
            return method.body(under(values, path), h, x, norm)

        with rewritten(self.name, module, method.after, new):
            return module(**ZOO[self.name].inputs(rows, length))


@pytest.fixture(scope="module")
def operated() -> dict[tuple[str, str], OperatedModel]:
    return {}


@pytest.fixture(params=CASES, ids=["-".join(case) for case in CASES])
def case(request: pytest.FixtureRequest, operated: dict[tuple[str, str], OperatedModel]) -> Case:
    name, method = request.param
    if request.param not in operated:
        made = ps.apply(captured(name), METHODS[method].rule, **METHODS[method].settings)
        operated[request.param] = randomise(made.eval(), scale=0.2)
    return Case(name, METHODS[method], operated[request.param])


def logits(model: Any, name: str) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**ZOO[name].inputs(3, 6))[0]
    return result


def test_outputs_and_gradients_are_those_of_the_published_formula(case: Case) -> None:
    values = leaves(case.ours)
    expected = case.theirs(values)
    readout(expected).backward()
    case.ours.zero_grad()
    output = case.ours(**ZOO[case.name].inputs(3, 6))
    readout(output).backward()
    size = max(1.0, float(expected[0].detach().abs().max()))
    torch.testing.assert_close(output[0], expected[0], rtol=0, atol=1e-6 * size)
    assert values, "the method adds parameters"
    for name, value in case.ours.learnt().items():
        assert value.grad is not None, name
        assert value.grad.abs().max() > 0, name
        torch.testing.assert_close(value.grad, values[name].grad, rtol=0, atol=1e-5, msg=name)
    before = logits(captured(case.name), case.name)
    assert (output[0] - before).abs().max() > 0.02 * before.abs().max(), "it must have an effect"


def test_ejecting_restores_the_graphs_and_the_outputs(case: Case) -> None:
    base = captured(case.name)
    assert ps.eject(case.ours) is base
    assert torch.equal(logits(ps.eject(case.ours), case.name), logits(base, case.name))


def test_a_saved_adapter_reloads_exactly(case: Case, tmp_path: Path) -> None:
    case.ours.save(tmp_path / "adapter")
    again = ps.load(tmp_path / "adapter", base=captured(case.name))
    assert torch.equal(logits(again, case.name), logits(case.ours, case.name))


def test_folding_is_refused_with_the_reason(case: Case) -> None:
    with pytest.raises(ps.SurgeryError, match=r"PSG401(.|\n)*not a change of weights"):
        ps.fold(case.ours)


@pytest.mark.parametrize("rule", ["houlsby", "parallel_adapter"])
@pytest.mark.parametrize("name", ["bert_mlm", "llama"])
def test_training_lowers_the_loss(name: str, rule: str) -> None:
    model = ps.apply(captured(name), rule, reduction_factor=4).train()
    inputs = ZOO[name].inputs(3, 6)
    inputs["labels"] = inputs["input_ids"].flip(1)
    losses = losses_of(model, inputs)
    assert losses[-1] < losses[0] - 0.02


@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_parallel_adapter_changes_nothing(name: str) -> None:
    fresh = ps.apply(captured(name), "parallel_adapter")
    assert torch.equal(logits(fresh, name), logits(captured(name), name))


@pytest.mark.parametrize("name", ["llama"])
def test_parameters_start_as_published(name: str) -> None:
    torch.manual_seed(0)
    first = ps.apply(captured(name), "houlsby", reduction_factor=1).learnt()
    for ending, std in (("D", 0.02), ("U", 0.02), ("bd", 0.0), ("bu", 0.0)):
        values = torch.cat([v.flatten() for n, v in first.items() if n.endswith(f".{ending}")])
        assert float(values.detach().std()) == pytest.approx(std, rel=0.1), ending


@pytest.mark.parametrize("name", ["llama"])
def test_settings_choose_the_width_the_activation_the_scale_and_the_layers(name: str) -> None:
    settings = {"reduction_factor": 5, "non_linearity": "gelu", "scaling": 0.5}
    ours = ps.apply(captured(name), "houlsby", leave_out=[0], **settings)
    values = randomise(ours, scale=0.2).learnt()
    assert {n.split(".")[2] for n in values} == {"1"}
    assert {v.shape[0] for n, v in values.items() if n.endswith(".D")} == {6}

    def new(path: str, h: Tensor, x: Tensor, norm: Norm) -> Tensor:
        p = under(values, path)
        if not p:
            return h
        return h + 0.5 * (F.gelu(h @ p["D"].T + p["bd"]) @ p["U"].T + p["bu"])

    with rewritten(name, ZOO[name].build(), ("self", "ffn"), new) as theirs:
        expected = logits(theirs, name)
    torch.testing.assert_close(logits(ours, name), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["llama"])
def test_an_adapter_wider_than_the_model_still_has_one_unit(name: str) -> None:
    ours = ps.apply(captured(name), "houlsby", reduction_factor=64)
    assert {v.shape[0] for n, v in ours.learnt().items() if n.endswith(".D")} == {1}


@pytest.mark.parametrize("name", ["llama"])
def test_an_activation_that_is_not_there_is_refused_by_name(name: str) -> None:
    with pytest.raises(ps.SurgeryError, match=r"PSG124.*'swisch'\n.*swish"):
        ps.apply(captured(name), "houlsby", non_linearity="swisch")


@pytest.mark.parametrize("name", ["llama"])
def test_adapter_drop_leaves_the_first_layers_as_they_are(name: str) -> None:
    dropped = randomise(ps.apply(captured(name), "adapter_drop", name="a", drop=1), scale=0.2)
    whole = ps.apply(captured(name), "pfeiffer", name="a", leave_out=[0])
    assert {n.split(".")[2] for n in dropped.learnt()} == {"1"}
    assert set(dropped.learnt()) == set(whole.learnt())
    whole.load_state_dict(dropped.state_dict())
    assert torch.equal(logits(dropped, name), logits(whole, name))


@pytest.mark.parametrize("name", ["llama"])
def test_layers_are_dropped_from_a_trained_adapter_when_it_is_activated(
    name: str, tmp_path: Path
) -> None:
    ours = randomise(ps.apply(captured(name), "houlsby"), scale=0.2).eval()
    whole = logits(ours, name)
    ours.activate("houlsby", leave_out=["..0"])
    dropped = logits(ours, name)
    fewer = ps.apply(captured(name), "houlsby", leave_out=[0])
    with torch.no_grad():
        for key, value in fewer.learnt().items():
            value.copy_(ours.get_parameter(key))
    assert torch.equal(dropped, logits(fewer, name))
    ours.save(tmp_path / "dropped")
    again = ps.load(tmp_path / "dropped", base=captured(name))
    assert torch.equal(logits(again, name), dropped)
    ours.activate("houlsby")
    assert torch.equal(logits(ours, name), whole)


def test_dropped_layers_stay_dropped_beside_another_adapter_and_are_not_written_whole(
    tmp_path: Path,
) -> None:
    ours = randomise(ps.apply(captured("bert"), "pfeiffer", name="a"), scale=0.2).eval()
    ours.activate("a", leave_out=[0])
    dropped = logits(ours, "bert")
    more = ps.apply(ours, "lora_qv", name="b").eval()  # which starts as nothing
    assert torch.equal(logits(more, "bert"), dropped)
    assert torch.equal(logits(ps.eject(more, "b"), "bert"), dropped)
    with pytest.raises(ps.SurgeryError, match=r"PSG512.*layers 0"):
        ps.to_adapterhub(ours, tmp_path / "hub")
    low = ps.apply(captured("bert"), "lora_qv", name="c")
    low.activate("c", leave_out=["..0"])
    with pytest.raises(ps.SurgeryError, match=r"PSG510.*layers \.\.0"):
        ps.to_peft(low, tmp_path / "peft")
    with pytest.raises(ps.SurgeryError, match="PSG316"):
        ps.combine(low, {"c": 1.0}, name="d")
    low.activate("c")
    ps.to_peft(low, tmp_path / "peft")


def test_layers_stay_left_out_of_an_adapter_that_is_chosen_again(tmp_path: Path) -> None:
    """Whatever leaves it out of calls for a while: choosing, another block, a file, a fold."""
    ours = randomise(ps.apply(captured("bert"), "pfeiffer", name="a"), scale=0.2).eval()
    ours.activate("a", leave_out=[0])
    dropped = logits(ours, "bert")
    ours = ps.apply(ours, "lora_qv", name="b").eval()  # which starts as nothing
    ours.choose("b")
    assert torch.equal(logits(ours, "bert"), logits(captured("bert"), "bert"))
    with ours.only("b"), ours.only("a"):
        assert torch.equal(logits(ours, "bert"), dropped)
    ours.save(tmp_path / "inactive")
    again = ps.load(tmp_path / "inactive", base=captured("bert")).eval()
    assert again.active == ("b",)
    for model in (ours, again, copy.deepcopy(ours), ps.eject(ours, "b")):
        model.choose("a")
        assert model.active == ("a",)
        assert torch.equal(logits(model.eval(), "bert"), dropped)
    ours.deactivate("a")
    ours.activate("a")  # which says anew that it acts in all
    assert not ours.left_out
    assert not torch.equal(logits(ours, "bert"), dropped)


@pytest.mark.parametrize("act", ["choose", "deactivate"])
def test_what_is_no_adapter_changes_nothing_that_is_left_out(act: str) -> None:
    ours = ps.apply(captured("bert"), "pfeiffer", name="a")
    ours.activate("a", leave_out=[0])
    with pytest.raises(ps.SurgeryError, match="PSG310"):
        getattr(ours, act)("other")
    with pytest.raises(ps.SurgeryError, match="PSG106"):
        ours.activate("a", leave_out=["x"])
    assert (ours.active, ours.left_out) == (("a",), {"a": [0]})


@pytest.mark.parametrize("item", ["", "1234567", "..", "3..1x"])
def test_what_is_no_layer_is_not_left_out(item: str) -> None:
    with pytest.raises(ps.SurgeryError, match="PSG106"):
        ps.apply(captured("llama"), "pfeiffer").activate(leave_out=[item])


@pytest.mark.parametrize("name", ["llama"])
def test_a_training_step_may_drop_other_layers_than_the_one_before(name: str) -> None:
    model = ps.apply(captured(name), "pfeiffer").train()
    inputs = ZOO[name].inputs(3, 6)
    for dropped in (1, 0):
        model.activate("pfeiffer", leave_out=range(dropped))
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        trained = {n.split(".")[2] for n, v in model.learnt().items() if v.grad is not None}
        assert trained == {str(layer) for layer in range(dropped, 2)}
    model.activate("pfeiffer", leave_out=range(2))
    assert torch.equal(logits(model, name), logits(captured(name), name))


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize("method", ["pfeiffer"])
def test_it_generates_what_the_original_with_the_adapter_generates(name: str, method: str) -> None:
    ours = randomise(ps.apply(remembering(name), method), scale=0.5).eval()
    values, body = dict(ours.learnt()), METHODS[method].body

    def new(path: str, h: Tensor, x: Tensor, norm: Norm) -> Tensor:
        return body(under(values, path), h, x, norm)

    for ways in ({}, {"num_beams": 2}):
        with rewritten(name, original(name), METHODS[method].after, new) as theirs:
            expected = tokens(theirs, **ways)
        assert torch.equal(tokens(ours, **ways), expected)
        assert not torch.equal(tokens(original(name), **ways), expected)
