"""Penalties, and parameters that are not trained: against the same sums written out in torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import peftsurgery as ps
from peftsurgery.surgery.model.operated import OperatedModel
from tests.parity.models import batch, captured

RULES = """
name: kept
with: {rank: 4, weight: 0.5}
rules:
  - match: linear
    where: {role: [attn.q, attn.v]}
    params:
      A0: {shape: [rank, in], init: normal(0.1), train: false}
      A: {shape: [rank, in], init: 2 * A0}
      B: {shape: [out, rank], init: zeros}
    rewrite: y + linear(linear(x, A), B)
    fold: W + B @ A
    penalty:
      mean: weight * norm(A @ transpose(A) - eye_like(A @ transpose(A)), [0, 1])
  - match: linear
    where: {role: attn.o}
    train: true
    penalty: 1e-3 * sum(W ** 2, [0, 1])
"""


@pytest.fixture(scope="module")
def model() -> OperatedModel:
    return ps.apply(captured("llama"), ps.parse_rules(RULES))


def written_out(model: OperatedModel) -> torch.Tensor:
    parameters = dict(model.named_parameters())
    rows = [p for name, p in parameters.items() if name.endswith("kept.A")]
    weights = [p for name, p in parameters.items() if name.endswith("o_proj.weight")]
    lengths = [torch.norm(A @ A.T - torch.eye(4), p="fro") for A in rows]
    return 0.5 * sum(lengths) / len(lengths) + sum(1e-3 * (W**2).sum() for W in weights)


def test_the_penalty_is_the_mean_or_the_sum_over_sites(model: OperatedModel) -> None:
    torch.testing.assert_close(model.penalty(), written_out(model))
    assert ps.apply(captured("llama"), "lora_qv").penalty() == 0


def test_the_loss_has_the_penalty_in_training_mode_alone(model: OperatedModel) -> None:
    plain = model.eval()(**batch()).loss
    trained = model.train()(**batch())
    torch.testing.assert_close(trained.loss, plain + model.penalty())
    assert trained["loss"] is trained[0] is trained.loss
    model.zero_grad()
    trained.loss.backward()
    name = "model.layers.0.self_attn.q_proj.kept.A"
    with_penalty = model.get_parameter(name).grad
    model.zero_grad()
    (model.eval()(**batch()).loss + written_out(model)).backward()
    torch.testing.assert_close(with_penalty, model.get_parameter(name).grad)


def test_parameters_that_are_not_trained_start_others_and_are_saved(
    model: OperatedModel, tmp_path: Path
) -> None:
    for name, parameter in model.learnt().items():
        assert parameter.requires_grad is not name.endswith(".A0")
        if name.endswith(".A0"):
            assert torch.equal(2 * parameter, model.get_parameter(name.replace("A0", "A")))
    model.save(tmp_path)
    again = ps.load(tmp_path, captured("llama"))
    assert all(torch.equal(p, again.get_parameter(n)) for n, p in model.learnt().items())
    assert not again.get_parameter("model.layers.0.self_attn.q_proj.kept.A0").requires_grad


def test_a_penalty_with_dimensions_is_refused() -> None:
    rules = ps.parse_rules(RULES.replace("sum(W ** 2, [0, 1])", "sum(W ** 2, 1)"))
    with pytest.raises(ps.SurgeryError, match=r"PSG133.*has shape \[32\]"):
        ps.apply(captured("llama"), rules).penalty()


def test_an_initial_value_reads_no_later_parameter() -> None:
    with pytest.raises(ps.SurgeryError, match=r"PSG113.*unknown name 'B'"):
        ps.parse_rules(RULES.replace("2 * A0", "2 * A0 * B"))


def test_a_penalty_reads_packed_weights_as_what_they_stand_for() -> None:
    first = RULES.partition("  - match: linear\n    where: {role: attn.o}")[0]
    text = first.replace("weight * norm(", "norm(W, [0, 1]) + norm(")
    model = ps.apply(captured("llama"), ["nf4", ps.parse_rules(text)])
    parameters = dict(model.named_parameters())
    expected = []
    for name in (name for name in parameters if name.endswith("kept.A")):
        weight = name.replace("kept.A", "weight")
        assert parameters[weight].dtype == torch.uint8
        A = parameters[name]
        expected.append(model.dense(weight).norm() + (A @ A.T - torch.eye(4)).norm())
    assert len(expected) == 4
    torch.testing.assert_close(model.penalty(), torch.stack(expected).mean())
