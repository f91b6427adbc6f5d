"""Selection: what each clause keeps, why it drops the rest, and what a rule may expect."""

import time
from dataclasses import replace

import pytest

from peftsurgery.errors import SurgeryError
from peftsurgery.language.loading import parse_rules
from peftsurgery.language.roles import VOCABULARY, role
from peftsurgery.language.selection import select, verdict
from tests.language.sites import Site, decoder, fused


def chosen(where, sites=None, kind="linear", expect="{at_least: 0}", settings=None, head=""):
    rewrite = "train: true" if kind == "parameter" else "rewrite: y"
    text = (
        f"name: t\nwith: {{from: 2, who: [attn.q]}}\n{head}\n"
        f"rules:\n  - {{match: {kind}, where: {where}, expect: {expect}, {rewrite}}}\n"
    )
    file = parse_rules(text, "t.yaml")
    given = {**file.with_, **(settings or {})}
    return select(decoder() if sites is None else sites, file.rules[0], given, file.roles, "t")


def names(selection):
    return [site.module.removeprefix("model.layers.") for site in selection.kept]


def outcome(*args, check=False, **kwargs):
    """The error of a selection (or of its check), or None."""
    try:
        selection = chosen(*args, **kwargs)
        if check:
            selection.check()
    except SurgeryError as error:
        return error
    return None


def refusal(*args, **kwargs):
    error = outcome(*args, **kwargs)
    assert error is not None
    return error


KEPT = {
    "{}": 4 * 6 + 1,
    "{role: attn.q}": 4,
    "{role: [attn.q, attn.v]}": 8,
    "{role: attn.*}": 16,
    "{role: [attn.q, lm_head]}": 5,
    "{not: {role: lm_head}}": 24,
    "{layers: 2}": 6,
    "{layers: '2..'}": 12,
    "{layers: '..0'}": 6,
    "{layers: '1..2', role: attn.o}": 2,
    "{layers: [0, '3..']}": 12,
    "{path: '.*[qv]_proj'}": 8,
    "{path: 'q_proj'}": 0,
    "{paths: [lm_head, model.layers.0.attn.q_proj]}": 2,
    "{block: model.layers.1}": 6,
    "{block: 'model.*'}": 24,
    "{shape: [32, 8]}": 4,
    "{shape: [null, 8]}": 4 * 5 + 1,
    "{dtype: bfloat16}": 8,
    "{type: Linear}": 25,
    "{op: addmm}": 0,
    "{facts: {out: 100}}": 1,
    "{any: [{role: attn.q}, {layers: 0}]}": 6 + 3,
    "{all: [{role: attn.*}, {layers: 0}]}": 4,
    "{feeds: {facts: {}, type: Linear}}": 12,
    "{fed_by: {layers: 1}}": 1,
    "{layers: $from, role: $who}": 1,
    "{layers: '$from..'}": 12,
}


@pytest.mark.parametrize("where", KEPT)
def test_clauses_keep_what_they_say(where):
    assert len(chosen(where).kept) == KEPT[where]


def test_parameters_are_addressed_by_their_own_name():
    assert len(chosen("{kind: bias, path: '.*bias'}", kind="parameter").kept) == 4


def test_every_dropped_site_says_which_clause_dropped_it():
    selection = chosen("{role: [attn.q, attn.v], layers: '2..'}")
    assert len(selection.kept) + len(selection.dropped) == 25
    assert all(candidate.reasons for candidate in selection.dropped)
    text = verdict(selection, "model.layers.2.attn.o_proj")
    assert "role is attn.o, not one of attn.q, attn.v" in text
    assert "in layer 0" in verdict(selection, "model.layers.0.attn.q_proj")
    assert "kept" in verdict(selection, "model.layers.3.attn.v_proj")
    assert "attention" in verdict(selection, "model.layers.3.attn")


def test_counts_fall_clause_by_clause():
    counts = chosen("{role: [attn.q, attn.v], layers: '2..'}").counts()
    assert [count for _, count in counts] == [25, 8, 4]


def test_the_nearest_miss_failed_the_fewest_clauses():
    selection = chosen("{role: attn.q, layers: 9}")
    assert [site.site.role for site in selection.near_misses(4)] == ["attn.q"] * 4


def test_why_of_an_unknown_path_names_the_nearest():
    with pytest.raises(SurgeryError) as caught:
        verdict(chosen("{}"), "model.layers.0.attn.q_prj")
    assert caught.value.code == "PSG303"
    assert "q_proj" in caught.value.hint


def test_a_misspelt_role_is_refused_at_its_place():
    error = refusal("{role: [attn.q, atn.v]}")
    assert error.code == "PSG142"
    assert "attn.v" in error.hint
    assert error.where.startswith("t.yaml:5:")


def test_a_path_that_is_not_there_is_refused():
    error = refusal("{paths: [model.layers.0.attn.q_prj]}")
    assert error.code == "PSG303"
    assert "q_proj" in error.hint


def test_a_regex_that_backtracks_for_ever_is_stopped():
    sites = [Site("linear", "a" * 60)]
    start = time.perf_counter()
    for pattern in ("(a|aa|a.)+(?=b)c", "(a*)*(a*)*(a*)*b[^a]", "(.*)*(.*)*(.*)*(.*)*(.*)*[^a]x"):
        error = outcome(f"{{path: '{pattern}'}}", sites, expect="{at_least: 1}", check=True)
        assert error.code in ("PSG140", "PSG301")
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize("pattern", ["((a{999}){999}){999}", "((((", "[b-a]", "(?P<n>a)(?P<n", "*"])
def test_a_regex_that_is_not_valid_or_a_bomb_is_refused(pattern):
    error = refusal(f"{{path: '{pattern}'}}")
    assert error.code == "PSG141"
    assert error.where.startswith("t.yaml:5:")


def test_a_rule_that_matches_nothing_is_an_error_with_counts_and_nearest_miss():
    error = refusal("{role: attn.q, layers: 9}", expect="{at_least: 1}", check=True)
    assert error.code == "PSG301"
    assert error.exit_code == 1
    assert "25  linear sites" in error.hint
    assert "4  role: attn.q" in error.hint
    assert "nearest miss: model.layers.0.attn.q_proj" in error.hint


@pytest.mark.parametrize(
    ("where", "expect", "code"),
    [
        ("{role: attn.q}", "4", None),
        ("{role: attn.q}", "3", "PSG302"),
        ("{role: attn.q}", "{at_most: 3}", "PSG302"),
        ("{role: attn.q}", "{at_least: 5}", "PSG302"),
        ("{role: [attn.q, attn.v]}", "{per_attention: 2}", None),
        ("{role: [attn.q, attn.v], layers: '2..'}", "{per_attention: 2}", None),
        ("{role: attn.q}", "{per_attention: 2}", "PSG302"),
        ("{role: ffn.*}", "{per_block: 2}", "PSG302"),
        ("{role: ffn.*, block: 'model.*'}", "{per_block: 2}", None),
    ],
)
def test_expectations_are_checked(where, expect, code):
    error = outcome(where, expect=expect, check=True)
    assert (error and error.code) == code


def test_a_core_whose_projections_were_not_recognised_is_not_passed_over():
    sites = decoder()
    for site in sites:
        if site.layer == 2 and site.kind == "linear":
            site.role, site.attentions = None, ()
    error = refusal("{role: [attn.q, attn.v]}", sites, expect="{per_attention: 2}", check=True)
    assert error.code == "PSG302"
    assert "core2 has 0" in error.message


def test_roles_count_and_not_sites():
    """Two projections to values are one role: they are not queries and values."""
    sites = decoder()
    for site in sites:
        if site.role == "attn.q":
            site.role = "attn.v"
    error = refusal("{role: [attn.q, attn.v]}", sites, expect="{per_attention: 2}", check=True)
    assert error.code == "PSG302"
    assert "core0 has 1 (attn.v)" in error.message
    joint = [replace(site, module=f"{site.module}_2") for site in decoder() if site.role]
    both = chosen("{role: [attn.q, attn.v]}", decoder() + joint, expect="{per_attention: 2}")
    both.check()
    assert len(both.kept) == 16


def test_a_projection_may_serve_two_cores():
    sites = decoder(1)
    second = Site("attention", "model.layers.0.attn", layer=0, attentions=("second",))
    for site in sites:
        site.attentions += ("second",) if site.role else ()
    chosen("{role: [attn.q, attn.v]}", [*sites, second], expect="{per_attention: 2}").check()
    for site in sites:
        site.attentions = site.attentions[:1]
    error = refusal(
        "{role: [attn.q, attn.v]}", [*sites, second], expect="{per_attention: 2}", check=True
    )
    assert "second has 0" in error.message


def test_a_core_without_a_projection_of_its_own_is_no_error_unless_the_rule_says_so():
    def sharing():
        sites = [s for s in decoder() if s.layer != 3 or s.role not in ("attn.k", "attn.v")]
        for site in sites:
            if site.kind == "attention" and site.layer == 3:
                site.facts = {"unprojected": ("attn.k", "attn.v")}
        return sites

    found = chosen("{role: [attn.q, attn.v]}", sharing(), expect="{per_attention: 2}")
    found.check()
    assert found.counted.unprojected == {"core3": ["attn.v"]}
    expect = "{per_attention: 2, complete: true}"
    error = refusal("{role: [attn.q, attn.v]}", sharing(), expect=expect, check=True)
    assert "core3 has 1 (attn.q)" in error.message
    left = [s for s in sharing() if s.role != "attn.q" or s.layer != 3]
    error = refusal("{role: [attn.q, attn.v]}", left, expect="{per_attention: 2}", check=True)
    assert "core3 has 0" in error.message, "queries are projected"
    nothing = [s for s in sharing() if s.layer == 3]
    error = refusal("{role: attn.v}", nothing, expect="{per_attention: 1}", check=True)
    assert error.code == "PSG301"


def test_parts_of_a_fused_weight_give_way_to_the_whole_if_both_are_chosen():
    both = chosen("{}", fused())
    assert [site.role for site in both.kept] == ["attn.qkv"] * 2
    assert "the whole fused weight is chosen" in verdict(both, "h.0.c_attn")
    parts = chosen("{role: [attn.q, attn.v]}", fused(), expect="{per_attention: 2}")
    parts.check()
    assert len(parts.kept) == 4


def test_a_rule_file_defines_roles_of_its_own():
    head = "roles: {late: {layers: '3..'}, late_q: {all: [{role: late}, {role: attn.q}]}}"
    assert names(chosen("{role: late_q}", head=head)) == ["3.attn.q_proj"]
    assert len(chosen("{not: {role: late}, role: attn.*}", head=head).kept) == 12


def test_python_registers_roles(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("peftsurgery.language.roles._registered", {})  # not for other tests

    @role("wide_for_test")
    def wide(site):
        return site.facts.get("out", 0) >= 32

    assert len(chosen("{role: wide_for_test}").kept) == 5
    with pytest.raises(SurgeryError) as caught:
        role("attn.q")(wide)
    assert caught.value.code == "PSG143"
    assert role("wide_for_test")(wide) is wide, "a cell of a notebook that is run again"
    with pytest.raises(SurgeryError) as caught:
        role("wide_for_test")(lambda site: False)
    assert caught.value.code == "PSG143"
    assert "attn.q" in VOCABULARY
