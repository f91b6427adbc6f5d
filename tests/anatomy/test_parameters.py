"""Parameters as sites: those that the model has, and which of them are biases."""

from __future__ import annotations

import pytest

from tests.anatomy.found import sites
from tests.models.zoo import ZOO


@pytest.mark.parametrize("name", ["bert", "gpt2", "falcon_1b", "bloom", "bart", "resnet", "swin"])
def test_the_biases_are_the_parameters_called_bias(name: str) -> None:
    model = ZOO[name].build()
    found = {site.parameter for site in sites(name, "parameter") if site.facts["kind"] == "bias"}
    called = {n for n, _ in model.named_parameters() if n.rpartition(".")[2] == "bias"}
    assert found == called


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "mixtral", "functional", "vit"])
def test_every_parameter_that_is_used_is_a_site(name: str) -> None:
    found = {site.parameter for site in sites(name, "parameter")}
    names = {n for n, _ in ZOO[name].build().named_parameters()}
    assert names <= found
