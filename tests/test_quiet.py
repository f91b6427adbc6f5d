"""What other libraries print, log and warn of while they work for us does not reach stderr."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as theirs

import peftsurgery as ps
from peftsurgery.quiet import LIBRARIES, quiet, unlogged

UNFIT = """
name: unfit
rules:
  - match: linear
    where: {role: attn.q}
    params:
      A: {shape: [3, 7], init: zeros}
    rewrite: y + x @ A
"""
FACTORY = """
import sys, warnings
import torch
from torch import nn

class Chooser(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x):
        y = self.proj(x)
        if self.training and y.sum() > 0:  # cannot be traced in train mode
            y = y + 1
        print("the model's own words", file=sys.stderr)
        return y

def made():
    return Chooser().eval(), {"x": torch.ones(2, 4)}
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose config makes transformers complain: its end is not in the vocabulary."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, eos_token_id=5000, pad_token_id=1)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def ran(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "peftsurgery", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_commands_that_succeed_leave_stderr_empty(llama: Path, tmp_path: Path) -> None:
    """Weights are read for pissa's start; a fold reads, writes and reads back."""
    applied = ran("apply", llama, "pissa", "-o", tmp_path / "surgery", "--set", "rank=2")
    assert (applied.returncode, applied.stderr) == (0, "")
    asked = ("-o", tmp_path / "folded", "--verify", "--allow-unchanged")
    folded = ran("fold", tmp_path / "surgery", *asked)
    assert (folded.returncode, folded.stderr) == (0, "")


@pytest.mark.slow
def test_a_command_that_fails_says_one_thing(llama: Path, tmp_path: Path) -> None:
    rule = tmp_path / "unfit.yaml"
    rule.write_text(UNFIT, encoding="utf-8")
    failed = ran("apply", llama, rule, "--dry-run")
    assert failed.returncode == 3
    assert failed.stderr.startswith("error: PSG116")
    assert "Traceback" not in failed.stderr
    assert len(failed.stderr.splitlines()) < 4


def test_what_cannot_be_traced_prints_no_graph(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """It cannot be captured in train mode and is in eval mode; what it prints itself stays."""
    scope: dict[str, object] = {}
    exec(FACTORY, scope)
    model, inputs = cast("Any", scope["made"])()
    ps.capture(model, inputs=inputs)
    said = capfd.readouterr()
    assert said.out == ""
    assert set(said.err.splitlines()) == {"the model's own words"}


def test_what_does_not_fit_on_fake_tensors_is_not_logged(
    capfd: pytest.CaptureFixture[str],
) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    graph = ps.capture(module, inputs=(torch.ones(2, 4),))
    with pytest.raises(ps.SurgeryError):
        ps.apply(graph, ps.parse_rules(UNFIT.replace("where: {role: attn.q}", "where: {path: .}")))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("library", LIBRARIES)
def test_only_what_libraries_say_in_this_thread_is_dropped(
    library: str, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())

    handler, logger = Keeping(), logging.getLogger(library)
    logger.addHandler(handler)
    try:
        with unlogged():
            logger.getChild("part").warning("a library's, here")
            logging.getLogger("users").warning("a user's, here")
            other = threading.Thread(target=logger.warning, args=("a library's, elsewhere",))
            other.start()
            other.join()
        logger.warning("a library's, later")
    finally:
        logger.removeHandler(handler)
    assert seen == ["a library's, elsewhere", "a library's, later"]
    assert "a user's, here" in capfd.readouterr().err


def test_warnings_of_a_user_are_shown_and_those_of_libraries_are_not() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with quiet():
            warnings.warn("a user's", stacklevel=1)
            warnings.warn_explicit("a library's", UserWarning, "f.py", 1, "torch.export._trace")
        warnings.warn_explicit("later", UserWarning, "f.py", 1, "torch.export._trace")
    assert [str(one.message) for one in shown] == ["a user's", "later"]


def test_bars_come_back_when_the_last_block_has_ended() -> None:
    assert theirs.is_progress_bar_enabled()
    first, second = quiet(), quiet()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # not nested, as in two threads
    assert not theirs.is_progress_bar_enabled()
    second.__exit__(None, None, None)
    assert theirs.is_progress_bar_enabled()
    theirs.disable_progress_bar()
    with quiet():
        pass
    try:
        assert not theirs.is_progress_bar_enabled()  # who hid them keeps them hidden
    finally:
        theirs.enable_progress_bar()


def test_export_can_print_again_afterwards() -> None:
    ps.capture(nn.Linear(2, 2), inputs=(torch.ones(2, 2),))
    assert "print" not in vars(torch.export._trace)


def test_blocks_of_two_threads_that_overlap_leave_the_filters_of_warnings_as_they_were() -> None:
    entered, may_leave = threading.Event(), threading.Event()

    def work() -> None:
        with quiet():
            entered.set()
            may_leave.wait(30)

    before = list(warnings.filters)
    thread = threading.Thread(target=work)
    with quiet(), quiet():
        thread.start()
        assert entered.wait(30)
    assert warnings.filters != before  # the other thread is still at work
    may_leave.set()
    thread.join(30)
    assert warnings.filters == before
    with pytest.raises(ZeroDivisionError), quiet():
        raise ZeroDivisionError
    assert warnings.filters == before
