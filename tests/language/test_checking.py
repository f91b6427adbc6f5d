"""rules check: it proves what is right and finds what is wrong."""

import pytest

from peftsurgery.errors import SurgeryError
from peftsurgery.language.checking import check_rules
from peftsurgery.language.loading import load_rules, parse_rules
from peftsurgery.language.operators import operator
from peftsurgery.language.shipped import shipped

RIGHT = {
    "match: linear, rewrite: y * s, fold: {W: 'W * s[:, None]', b: b * s}, "
    "params: {s: {shape: [out], init: ones}}": 3,
    "match: linear, rewrite: {x: x * s}, fold: W * s, params: {s: {shape: [in], init: ones}}": 3,
    "match: norm, rewrite: y + c, fold: {b: b + c}, params: {c: {shape: [hidden]}}": 2,
    "match: residual, rewrite: 'h + linear(relu(linear(h, D)), U)', "
    "params: {D: {shape: [3, hidden]}, U: {shape: [hidden, 3]}}": 2,
    "match: attention, rewrite: o * g, params: {g: {shape: [1]}}": 4,
    "match: parameter, rewrite: W * g, fold: W * g, params: {g: {shape: [columns]}}": 3,
    "match: parameter, rewrite: W + D, fold: W + D, params: {D: {shape: [rows, columns]}}": 1,
    "match: residual, rewrite: {y: 2 * y, x: x - h}": 2,
    "match: linear, rewrite: {x: 2 * x, y: 3 * y}, fold: {W: 6 * W, b: 3 * b}": 3,
    "match: experts, rewrite: 'y + expert_linear(x, D)', fold: W + D, "
    "params: {D: {shape: [experts, out, in]}}": 2,
    "match: experts, rewrite: {W: W * s}, fold: W * s, params: {s: {shape: [experts, 1, in]}}": 2,
}

WRONG = {
    "rewrite: 'y + 2 * linear(x, A)', fold: W + A": "PSG130",
    "rewrite: y * 2, fold: W * 2": "PSG130",
    "rewrite: 'y + linear(x, A)', fold: W - A": "PSG130",
    "rewrite: 'sum(y, -1)'": "PSG131",
    "rewrite: 'y[..., None]'": "PSG131",
    "rewrite: 'y + linear(x, A)', fold: 'sum(W, 0)'": "PSG131",
    "rewrite: 'y + linear(y, A)'": "PSG116",
    "rewrite: 'y + linear(x, A)', fold: A @ W": "PSG116",
    "rewrite: 'looks_at_values_for_test(y)'": "PSG132",
    "rewrite: 'norm(y)'": "PSG115",
}


@operator("looks_at_values_for_test")
def looks(value):
    """Looks at a value, which a graph cannot."""
    return value * float(value.sum())


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_rule_fits_and_folds_to_what_it_rewrites_if_it_folds(name):
    file = load_rules(name)
    report = check_rules(file)
    assert not any(file.rules[number - 1].rewrite for number in report.unchecked)
    for check in report.checks:
        folds = bool(file.rules[check.rule - 1].fold)
        assert (check.folded is not None) == folds
        assert check.folded is None or check.folded < 1e-12


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dora_agrees_with_and_without_dropout(dropout):
    assert check_rules(load_rules("dora"), {"dropout": dropout}).checks


@pytest.mark.parametrize("body", RIGHT)
def test_right_rules_pass_at_every_size(body):
    report = check_rules(parse_rules(f"name: t\nrules: [{{{body}}}]"))
    assert len(report.checks) == RIGHT[body]


@pytest.mark.parametrize("body", WRONG)
def test_a_wrong_rule_is_refused_by_its_number_and_the_sizes(body):
    text = f"name: t\nrules: [{{match: linear, params: {{A: {{shape: [out, in]}}}}, {body}}}]"
    with pytest.raises(SurgeryError) as refusal:
        check_rules(parse_rules(text, "t.yaml"))
    assert refusal.value.code == WRONG[body]


def test_the_message_names_rule_expression_and_sizes():
    text = "name: t\nrules: [{match: linear, rewrite: y * 2, fold: W * 3}]"
    with pytest.raises(SurgeryError) as refusal:
        check_rules(parse_rules(text, "t.yaml"))
    assert "rule 1 (linear) at in 18, out 14" in refusal.value.message
    assert "W = W * 3" in refusal.value.message
    assert refusal.value.where.startswith("t.yaml:2:")


def test_rules_that_only_a_model_can_check_are_listed():
    text = "name: t\nrules:\n  - {match: {pattern: silu(x)}, rewrite: y}\n"
    assert check_rules(parse_rules(text)).unchecked == (1,)


def test_a_rule_that_computes_nothing_says_what_it_does():
    text = "name: t\nrules:\n  - {match: norm, train: true}\n  - {match: linear, store: nf4()}\n"
    report = check_rules(parse_rules(text))
    assert report.trained == (1, 2)
    assert "rule 1: trains W and b of its norm sites, nothing to compute" in str(report)
    assert "keeps W of its linear sites in another form" in str(report)
    assert "0 checks" not in str(report)


# Kronecker factors, rotations of blocks of 32 inputs, sums over groups of 16: sizes must divide.
DIVIDING = {
    "params: {A: {shape: [f, f]}, B: {shape: [out // f, in // f]}}, "
    "let: {D: 'reshape(A[:, None, :, None] * B[None, :, None, :], [out, in])'}, "
    "rewrite: 'y + linear(x, D)', fold: W + D": 8,
    "params: {A: {shape: [in // 32, 32, 32]}}, "
    "let: {T: 'reshape(transpose(W), [in // 32, 32, out])', "
    "V: 'reshape(matmul(transpose(A), T), [in, out])'}, "
    "rewrite: 'linear(x, transpose(V), b)', fold: transpose(V)": 32,
    "params: {A: {shape: [out, in // 16]}}, "
    "let: {D: 'reshape(A[:, :, None] * ones_like(reshape(W, [out, in // 16, 16])), [out, in])'}, "
    "rewrite: 'y + linear(x, D)', fold: W + D": 16,
}


@pytest.mark.parametrize("body", DIVIDING)
def test_specimens_adapt_to_rules_whose_sizes_must_divide(body):
    file = parse_rules(f"name: t\nwith: {{f: 8}}\nrules: [{{match: linear, {body}}}]")
    report = check_rules(file)
    assert len(report.checks) == 3
    assert all(check.folded < 1e-12 for check in report.checks)
    first = report.checks[0]
    assert first.unfit[0].startswith("in 18, out 14")
    assert "it does not fit in 18, out 14" in str(report)
    sizes = [int(word) for word in first.specimen.replace(",", "").split() if word.isdigit()]
    assert sizes[0] != sizes[1]  # a square would hide a weight that is the wrong way round
    fixed = check_rules(file, sizes={"in": 64, "out": 128})
    assert {check.specimen[:15] for check in fixed.checks} == {"in 64, out 128,"}
    with pytest.raises(SurgeryError):
        check_rules(file, sizes={"in": 18, "out": 14})


def test_a_wrong_fold_is_found_at_the_sizes_that_fit():
    body = "params: {A: {shape: [out, in // 16]}}, let: {D: 'reshape(A[:, :, None] * "
    body += "ones_like(reshape(W, [out, in // 16, 16])), [out, in])'}, rewrite: 'y + linear(x, D)'"
    with pytest.raises(SurgeryError) as refusal:
        check_rules(parse_rules(f"name: t\nrules: [{{match: linear, {body}, fold: W - D}}]"))
    assert refusal.value.code == "PSG130"


@pytest.mark.parametrize("sizes", [{"inn": 3}, {"in": 0}, {"in": 2.5}, {"in": True}, {"in": 10**9}])
def test_sizes_that_no_site_has_are_refused(sizes):
    with pytest.raises(SurgeryError) as refusal:
        check_rules(load_rules("lora_qv"), sizes=sizes)
    assert refusal.value.code == "PSG134"


PROMPT = "params: {K: {shape: [3, %s, head_dim]}, V: {shape: [3, %s, head_dim]}}, rewrite: '%s'"


@pytest.mark.parametrize(
    ("heads", "text", "reason"),
    [
        (
            "heads",
            "attention(q, concat(tokens(K), k), concat(tokens(V), v), extend(mask, 3))",
            "Sizes",
        ),
        ("heads", "o + attention(q, tokens(K), tokens(V), unmasked(tokens(K)))", "heads"),
        ("kv_heads", "o + attention(q, tokens(K), tokens(V))", "mask that the core has"),
        ("kv_heads", "attention(q, concat(tokens(K), k), concat(tokens(V), v))", "mask that"),
        ("kv_heads", "o + attention(q, tokens(K), tokens(V), mask)", "mask is for"),
        ("kv_heads", "attention(q, concat(tokens(K), k), v, extend(mask, 3))", "values"),
        ("kv_heads", "o + attention(q, k, v, extend(mask, 3))", "mask is for"),
    ],
)
def test_what_no_attention_core_could_take_is_refused(heads, text, reason):
    file = parse_rules(f"name: t\nrules: [{{match: attention, {PROMPT % (heads, heads, text)}}}]")
    with pytest.raises(SurgeryError) as refusal:
        check_rules(file)
    assert refusal.value.code == "PSG116"
    assert reason in refusal.value.message


@pytest.mark.parametrize(
    "text",
    [
        "o + attention(q, tokens(K), tokens(V), unmasked(tokens(K)))",
        "attention(q, concat(tokens(K), k), concat(tokens(V), v), extend(mask, 3))",
    ],
)
def test_attention_is_checked_with_grouped_queries_more_keys_and_no_mask(text):
    file = parse_rules(
        f"name: t\nrules: [{{match: attention, {PROMPT % ('kv_heads', 'kv_heads', text)}}}]"
    )
    titles = [check.specimen for check in check_rules(file).checks]
    assert len({title.split(" mask")[0] for title in titles}) == 4
    assert any("2 kv heads, no mask, 5 queries, 7 keys" in title for title in titles)
