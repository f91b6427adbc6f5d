"""Activations by name, against transformers' own."""

import pytest
import torch
from torch import fx
from transformers.activations import ACT2FN

from peftsurgery.errors import SurgeryError
from peftsurgery.language.activations import ACTIVATIONS
from peftsurgery.language.evaluation import evaluate
from peftsurgery.language.expression import parse
from peftsurgery.language.maths import maths

X = torch.linspace(-4, 4, 33)


@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) & set(ACT2FN)))
def test_an_activation_is_transformers_own(name: str) -> None:
    value = evaluate(parse("activation(chosen, x)"), {"chosen": name, "x": X})
    torch.testing.assert_close(value, ACT2FN[name](X))


def test_an_unknown_activation_is_refused_with_the_nearest() -> None:
    with pytest.raises(SurgeryError, match=r"PSG124.*'relux'\n.*relu"):
        evaluate(parse("activation(chosen, x)"), {"chosen": "relux", "x": X})


def test_it_prints_as_the_function_that_the_setting_names() -> None:
    assert maths(parse("activation(f, linear(h, D, bd))"), {"f": "relu"}) == "f(D·h + bd)"


def test_an_activation_reads_as_a_graph_node() -> None:
    graph = fx.Graph()
    proxy = fx.Proxy(graph.placeholder("x"), fx.proxy.GraphAppendingTracer(graph))
    graph.output(evaluate(parse("activation(chosen, x)"), {"chosen": "gelu_new", "x": proxy}).node)
    torch.testing.assert_close(fx.GraphModule(torch.nn.Module(), graph)(X), ACT2FN["gelu_new"](X))
