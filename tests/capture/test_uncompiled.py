"""Graph modules that are left uncompiled compute what they are, once they are called."""

from __future__ import annotations

import copy
import threading

import torch
from torch import Tensor, fx, nn

from peftsurgery.capture.uncompiled import uncompiled


class Doubling(nn.Module):
    """Twice a number, and one."""

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of any shape."""
        return 2 * x + 1


def test_nothing_is_compiled_until_it_is_called() -> None:
    with uncompiled():
        made = fx.symbolic_trace(Doubling())
        assert not hasattr(made, "_code")
    assert made(torch.tensor(3)) == 7
    assert "def forward" in made.code


def test_a_change_before_the_first_call_counts() -> None:
    with uncompiled():
        made = fx.symbolic_trace(Doubling())
        last = made.graph.output_node().args[0]
        assert isinstance(last, fx.Node)
        last.update_arg(1, 10)
        assert copy.deepcopy(made)(torch.tensor(3)) == 16
        assert made(torch.tensor(3)) == 16


def test_what_was_compiled_before_is_compiled_again_when_it_changed() -> None:
    made = fx.symbolic_trace(Doubling())
    assert made(torch.tensor(3)) == 7
    last = made.graph.output_node().args[0]
    assert isinstance(last, fx.Node)
    with uncompiled():
        last.update_arg(1, 10)
        made.recompile()
        assert made(torch.tensor(3)) == 16


def test_other_threads_compile_as_ever() -> None:
    made: list[fx.GraphModule] = []
    with uncompiled(), uncompiled():
        thread = threading.Thread(target=lambda: made.append(fx.symbolic_trace(Doubling())))
        thread.start()
        thread.join()
        assert "def forward" in made[0].code
        assert fx.symbolic_trace(Doubling())(torch.tensor(3)) == 7
    assert "def forward" in fx.symbolic_trace(Doubling()).code
