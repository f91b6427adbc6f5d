"""A method of one's own, as README tells: a YAML file, and no Python that is part of it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertModel

import peftsurgery as ps

Run = Callable[..., Any]
README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def method(tmp_path: Path) -> Path:
    """The rule file that README shows, as a reader saves it."""
    text = re.search(r"^```yaml\n(# gated\.yaml\n.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert text is not None
    path = tmp_path / "gated.yaml"
    path.write_text(text[1], encoding="utf-8")
    return path


def test_the_file_is_checked_and_explained(run: Run, method: Path) -> None:
    assert run("rules", "check", method).code == 0
    shown = run("rules", "show", method).out
    assert "tanh(g)" in shown
    assert "attn.q" in shown


@pytest.mark.slow
def test_it_is_applied_trained_saved_and_folded_without_python_of_its_own(
    run: Run, method: Path, bert: Path, tmp_path: Path
) -> None:
    surgery, folded = tmp_path / "surgery", tmp_path / "folded"
    applied = run("apply", bert, method, "-o", surgery, "--set", "rank=3", "--set", "scale=0.5")
    assert applied.code == 0
    operated = ps.load(surgery)
    train(operated)
    operated.save(surgery)
    assert run("fold", surgery, "-o", folded, "--verify").code == 0

    tokens = torch.randint(99, (3, 9))
    with torch.no_grad():
        expected = operated.eval()(input_ids=tokens).last_hidden_state
        plain = BertModel.from_pretrained(folded).eval()(input_ids=tokens).last_hidden_state
    assert (plain - expected).abs().max() < 2e-6
    assert_folded_as_the_paper_would(operated, bert, folded)


def train(operated: ps.OperatedModel) -> None:
    """Ten steps away from the start; every parameter of the method takes part."""
    tokens = torch.randint(99, (4, 8))
    trainable = {n: p for n, p in operated.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trainable.items()}
    assert {name.rpartition(".")[2] for name in trainable} == {"A", "B", "g"}
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2)
    losses = []
    for _ in range(10):
        hidden = operated(input_ids=tokens).last_hidden_state
        loss = (hidden - hidden.detach().roll(1, 0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not any(torch.equal(start[name], p) for name, p in trainable.items())


def assert_folded_as_the_paper_would(operated: ps.OperatedModel, bert: Path, folded: Path) -> None:
    """W + s tanh(g) (B A), in plain numpy and double precision, for each matched weight."""
    before = BertModel.from_pretrained(bert).state_dict()
    after = BertModel.from_pretrained(folded).state_dict()
    learnt = {name: p.detach().double().numpy() for name, p in operated.learnt().items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{match['module']}.weight" for match in operated.report.matches}
    for name in changed:
        A, B, g = (learnt[f"{name.removesuffix('.weight')}.gated.{p}"] for p in ("A", "B", "g"))
        expected = before[name].double().numpy() + 0.5 * np.tanh(g)[:, None] * (B @ A)
        assert np.abs(after[name].double().numpy() - expected).max() < 1e-7


def test_a_slip_in_the_file_is_named_with_its_place(run: Run, method: Path, bert: Path) -> None:
    method.write_text(method.read_text().replace("gate * linear", "gaet * linear"))
    result = run("apply", bert, method, "--dry-run")
    assert result.code == 3
    assert "gaet" in result.err
    assert "did you mean 'gate'" in result.err
    assert re.search(r"gated\.yaml:\d+:\d+", result.err)


def test_why_says_what_kept_a_place_out(run: Run, method: Path, bert: Path) -> None:
    assert "attn.k" in run("why", bert, method, "encoder.layer.0.attention.self.key").out
