"""Roles: those that sites have, those that users define, and names that nobody has."""

from __future__ import annotations

import pytest

import peftsurgery as ps
from peftsurgery.language.roles import VOCABULARY, Roles
from tests.language.sites import decoder


@pytest.fixture(autouse=True)
def _nobody_else_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftsurgery.language.roles._registered", {})


def test_a_site_has_its_own_role_and_all_that_users_define() -> None:
    @ps.role("wide")
    def wide(site: object) -> bool:
        """More outputs than inputs."""
        facts = site.facts
        return site.kind == "linear" and facts["out"] > facts["in"]

    sites = decoder(1)
    roles = Roles.among(sites).extended("first", lambda site: site.layer == 0)
    up = next(site for site in sites if site.role == "ffn.up")
    head = next(site for site in sites if site.role == "lm_head")
    core = next(site for site in sites if site.kind == "attention")
    assert roles.of(up) == ["ffn.up", "wide", "first"]
    assert roles.of(head) == ["lm_head", "wide"]
    assert roles.of(core) == ["first"]


def test_a_role_is_known_if_some_site_could_have_it() -> None:
    roles = Roles.among(decoder(1)).extended("mine", lambda site: True)
    for name in (*VOCABULARY, "mine", "attn.*", "*"):
        roles.check(name)
    with pytest.raises(ps.SurgeryError, match=r"PSG142(.|\n)*did you mean 'attn\."):
        roles.check("attn.p")
    with pytest.raises(ps.SurgeryError, match="PSG142"):
        roles.check("mlp.*")


@pytest.mark.parametrize("name", ["attn.q", "", "attn.*"])
def test_a_role_of_the_anatomy_s_is_not_another_s(name: str) -> None:
    with pytest.raises(ps.SurgeryError, match="PSG143"):
        ps.role(name)(lambda site: True)


def test_a_role_is_defined_once_but_may_be_run_again() -> None:
    def define() -> None:
        @ps.role("mine")
        def mine(site: object) -> bool:
            return True

    define()
    define()
    with pytest.raises(ps.SurgeryError, match="PSG143"):
        ps.role("mine")(lambda site: False)
