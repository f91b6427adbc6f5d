"""Clauses one by one: what each says of a site that it does not hold for."""

from __future__ import annotations

from typing import Any

import pytest

import peftsurgery as ps
from peftsurgery.language.clauses import (
    clauses_in_words,
    compile_where,
    failures,
    passes,
    weight_shape,
)
from peftsurgery.language.roles import Roles
from peftsurgery.language.where import Where
from tests.language.sites import Site, decoder

SITES = {f"{site.module}:{site.kind}": site for site in decoder(2)}
QUERY = SITES["model.layers.1.attn.q_proj:linear"]


def compiled(clauses: dict[str, Any]) -> Any:
    return compile_where(Where.model_validate(clauses), Roles.among(SITES.values()))


@pytest.mark.parametrize(
    ("clauses", "reason"),
    [
        ({"role": ["attn.k", "ffn.*"]}, "role is attn.q, not one of attn.k, ffn.*"),
        ({"path": r".*\.k_proj"}, r"'model.layers.1.attn.q_proj' is not what path matches .*\.k_p"),
        ({"type": "Conv1D"}, "type is Linear, not Conv1D"),
        ({"op": "addmm"}, "op is linear, not addmm"),
        ({"kind": "self"}, "kind is unknown, not self"),
        ({"layers": ["..0", 4]}, "it is in layer 1 (layers: ..0, 4)"),
        ({"block": "model.layers.0"}, "block is model.layers.1, not model.layers.0"),
        ({"shape": [None, 32]}, "shape is [8, 8], not [any, 32]"),
        ({"dtype": "bfloat16"}, "dtype is float32, not bfloat16"),
        ({"facts": {"out": 32}}, "out is 8, not 32"),
        ({"not": {"role": "attn.*"}}, "it is (role: attn.*)"),
        ({"any": [{"layers": 0}, {"role": "lm_head"}]}, "it is in layer 1 (layers: 0); role is"),
        ({"feeds": {"role": "ffn.down"}}, "feeds model.layers.1.attn (attention), none with role"),
    ],
)
def test_a_clause_says_what_the_site_has_instead(clauses: dict[str, Any], reason: str) -> None:
    made = compiled(clauses)
    (failed,) = failures(made, QUERY)
    assert failed.reason(QUERY).startswith(reason)
    assert not passes(made, QUERY)


def test_all_clauses_must_hold_and_are_described_together() -> None:
    made = compiled({"role": "attn.q", "layers": 1, "all": [{"op": "linear"}]})
    assert [site for site in SITES.values() if passes(made, site)] == [QUERY]
    assert clauses_in_words(made) == "role: attn.q and layers: 1 and op: linear"
    assert clauses_in_words(()) == "anything"


def test_no_role_at_all_leaves_every_site_out() -> None:
    made = compiled({"role": []})
    assert not any(passes(made, site) for site in SITES.values())


def test_an_earlier_rule_is_known_by_its_modules() -> None:
    roles = Roles.among(SITES.values(), {"first": frozenset({QUERY.module})})
    made = compile_where(Where.model_validate({"matched": "first"}), roles)
    assert [s for s in SITES.values() if s.kind == "linear" and passes(made, s)] == [QUERY]
    with pytest.raises(ps.SurgeryError, match="PSG145"):
        compile_where(Where.model_validate({"matched": "second"}), roles)


@pytest.mark.parametrize(
    ("kind", "facts", "shape"),
    [
        ("linear", {"in": 4, "out": 6}, [6, 4]),
        ("embedding", {"in": 99, "out": 6}, [99, 6]),
        ("experts", {"experts": 3, "in": 4, "out": 6}, [3, 6, 4]),
        ("conv", {"in": 8, "out": 6, "groups": 2, "kernel": (3, 5)}, [6, 4, 3, 5]),
        ("norm", {"width": 8}, [8]),
        ("parameter", {"shape": (2, 3)}, [2, 3]),
        ("residual", {"width": 8}, None),
    ],
)
def test_a_weight_has_the_shape_that_rules_see(
    kind: str, facts: dict[str, Any], shape: list[int] | None
) -> None:
    assert weight_shape(Site(kind, "m", facts=facts)) == shape
