"""Initial values against torch's own initialisers, seed for seed."""

import math

import pytest
import torch

from peftsurgery.errors import SurgeryError
from peftsurgery.language.expression import parse
from peftsurgery.language.initial import INITIALISERS, initial
from peftsurgery.language.loading import parse_rules
from peftsurgery.language.readings import initial_values, weights_read

ORACLES = {
    "kaiming_uniform(sqrt(5))": lambda t: torch.nn.init.kaiming_uniform_(t, a=math.sqrt(5)),
    "kaiming_uniform": torch.nn.init.kaiming_uniform_,
    "xavier_uniform": torch.nn.init.xavier_uniform_,
    "normal(0.02)": lambda t: torch.nn.init.normal_(t, std=0.02),
    "normal(std=2)": lambda t: torch.nn.init.normal_(t, std=2),
    "uniform(-1, 1)": lambda t: torch.nn.init.uniform_(t, -1, 1),
    "zeros": torch.nn.init.zeros_,
    "ones": torch.nn.init.ones_,
    "eye": torch.nn.init.eye_,
    "0.25": lambda t: t.fill_(0.25),
    "2 * normal(1) + 1": lambda t: torch.nn.init.normal_(t) * 2 + 1,
}


@pytest.mark.parametrize("text", ORACLES)
@pytest.mark.parametrize("shape", [(4, 8), (8, 3)])
def test_an_initialiser_is_torchs_under_the_same_seed(text, shape):
    torch.manual_seed(5)
    expected = ORACLES[text](torch.empty(shape))
    torch.manual_seed(5)
    assert torch.equal(initial(parse(text), shape, {}), expected)


def test_a_generator_is_used_and_leaves_the_global_seed_alone():
    state = torch.get_rng_state()
    draws = [
        initial(parse("normal(1)"), (5,), {}, generator=torch.Generator().manual_seed(2))
        for _ in range(2)
    ]
    assert torch.equal(*draws)
    assert torch.equal(state, torch.get_rng_state())


def test_a_tensor_expression_is_read_in_the_parameters_dtype():
    W = torch.randn(6, 8).bfloat16()
    rule = parse_rules(
        "name: t\nrules:\n  - match: linear\n    rewrite: y * m\n"
        "    let: {n: 'norm(W, 1)'}\n    params: {m: {shape: [out], init: n}}\n"
    ).rules[0]
    env = {"W": W, "b": 0.0, "in": 8, "out": 6}
    value = initial_values(rule, env, {})["m"]
    assert value.dtype == torch.float32
    assert torch.equal(value, torch.linalg.norm(W.float(), dim=1))
    assert weights_read(rule.params["m"], rule) == {"W"}


def test_a_value_is_a_copy_and_carries_no_gradient():
    W = torch.ones(3, requires_grad=True)
    value = initial(parse("W"), (3,), {"W": W})
    assert not value.requires_grad
    assert value.data_ptr() != W.data_ptr()


@pytest.mark.parametrize("text", ["W", "eye", "sum(W, 0, True)"])
def test_a_value_of_another_shape_is_refused(text):
    with pytest.raises(SurgeryError) as refusal:
        initial(parse(text), (5,), {"W": torch.ones(3, 5)})
    assert refusal.value.code == "PSG123"


def test_initialisers_work_on_the_meta_device():
    for name in INITIALISERS:
        assert initial(parse(name), (4, 4), {}, device="meta").device.type == "meta"
