"""What README says of the shipped rules: they are for every kind of model that has their sites."""

from __future__ import annotations

import pytest

import peftsurgery as ps
from peftsurgery.language.loading import load_rules
from peftsurgery.language.shipped import shipped
from tests.models.captured import captured

CONVOLUTIONS = {name for name in shipped() if name.endswith("_conv")}
# What a rule needs that not every model has: its name ends in it, or README's sentence names it.
LACKING = {
    "bert": {*CONVOLUTIONS, "lora_experts"},
    "llama": {*CONVOLUTIONS, "lora_experts", "bitfit", "prompt_after_embedding"},
    "t5": {*CONVOLUTIONS, "lora_experts", "bitfit", "prompt_after_embedding"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LACKING)
def test_the_shipped_rules_work_on_encoders_decoders_and_both_or_name_what_is_missing(
    name: str,
) -> None:
    lacking = set()
    for method in shipped():
        model, over = captured(name), {}
        for setting in load_rules(method).with_.keys() & {"adapters"}:
            model = ps.apply(ps.apply(model, "pfeiffer", name="a"), "pfeiffer", name="b")
            over = {setting: ["a", "b"]}
        try:
            ps.apply(model, method, settings=over)
        except ps.SurgeryError as error:
            if error.code != "PSG301":
                raise
            lacking.add(method)
    assert lacking == LACKING[name]
