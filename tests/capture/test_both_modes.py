"""A capture is for one mode unless the forward does the same in both, dropouts and norms aside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftsurgery as ps
from tests.capture.pairs import assert_same, pair_of


class _Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(4, 4)
        self.rate = 0.5


class Scaled(_Linear):
    """Another factor in each mode."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.into(x)
        return y * 2 if self.training else y * 3


class Auxiliary(_Linear):
    """A further output in training."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.into(x)
        return {"y": y, "more": y + 1} if self.training else {"y": y}


class Hidden(_Linear):
    """The mode is asked for by a function that is told it, and by getattr."""

    def forward(self, x: Tensor) -> Tensor:
        y = _shifted(self.into(x), training=self.training)
        return y + 1 if getattr(self, "training", False) else y


def _shifted(x: Tensor, training: bool) -> Tensor:
    return x - 5 if training else x


class Chosen(_Linear):
    """The choice of a number, which is a rate of dropout and more."""

    def forward(self, x: Tensor) -> Tensor:
        rate = self.rate if self.training else 0.0
        return F.dropout(self.into(x), rate) + rate


class Weights(_Linear):
    """Another weight in each mode, another tensor in a list, and another buffer by a property."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
        self.tables = [torch.randn(4), torch.randn(4)]
        self.register_buffer("ones", torch.ones(4))
        self.register_buffer("twos", torch.ones(4) * 2)

    @property
    def factor(self) -> Tensor:
        return self.get_buffer("ones" if self.training else "twos")


class OtherWeight(Weights):
    def forward(self, x: Tensor) -> Tensor:
        return self.into(x) @ (self.one if self.training else self.two)


class OtherTable(Weights):
    def forward(self, x: Tensor) -> Tensor:
        return self.into(x) + (self.tables[0] if self.training else self.tables[1])


class OtherBuffer(Weights):
    def forward(self, x: Tensor) -> Tensor:
        return self.into(x) * self.factor


class Resized(_Linear):
    """The mode is a flag of torch's functions that says something else."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool1d(self.into(x)[None], 3, 3, 0, 1, self.training)
        return F.interpolate(y, size=8, mode="linear", align_corners=self.training)


class Asking(_Linear):
    """What is asked beside the mode is in a tensor, or a property that eval mode does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("is_new", torch.tensor(True))

    @property
    def teacher(self) -> bool:
        if not self.training:
            raise RuntimeError("there is no teacher")
        return False

    def forward(self, x: Tensor) -> Tensor:
        y = self.into(x)
        if self.training and self.teacher:
            y = y * 2
        return y - y.mean() if not self.training and self.is_new is not None else y


class Frozen(_Linear):
    """No gradient in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.training):
            return self.into(x)


class Noisy(_Linear):
    """Noise in training, drawn by torch."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.into(x)
        return y + torch.randn_like(y) if self.training else y


class Sizes(_Linear):
    """Eval mode has a case of its own for long inputs."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and x.shape[0] > 6:
            return self.into(x) * 7
        return self.into(x)


class Attending(_Linear):
    """Dropout in an attention core, as transformers writes it."""

    def forward(self, x: Tensor) -> Tensor:
        rate = 0.0 if not self.training else self.rate
        y = self.into(x)[None, None]
        return F.scaled_dot_product_attention(y, y, y, dropout_p=rate)


class Dropping(_Linear):
    """Dropout by function, that reads the mode of another module and is used beside its input."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.into(x)
        return y + F.dropout(y, self.rate, self.into.training)


class Idle(_Linear):
    """Code for training that does nothing here."""

    jitter = 0.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.into(x)
        if self.training and self.jitter > 0:
            y = y * torch.empty_like(y).uniform_(1 - self.jitter, 1 + self.jitter)
        return y


class Always(_Linear):
    """Random numbers in both modes."""

    def forward(self, x: Tensor) -> Tensor:
        return self.into(x) + torch.randn_like(x)


APART = (
    *(Scaled, Auxiliary, Hidden, Chosen, Frozen, Noisy, Sizes),
    *(OtherWeight, OtherTable, OtherBuffer, Resized, Asking),
)
TOGETHER = (Attending, Dropping, Idle, Always)


@pytest.mark.parametrize("kind", [*APART, *TOGETHER], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("train", [True, False], ids=["trained first", "evaluated first"])
def test_every_mode_is_the_originals_in_any_order(kind: type[nn.Module], train: bool) -> None:
    torch.manual_seed(0)
    both = pair_of(kind().train(train), {"x": torch.randn(3, 4)})
    for mode in (train, not train, train):
        both.train(mode)
        for batch in (2, 9):
            expected, actual = both.run(torch.randn(batch, 4))
            assert_same(expected, actual)
    assert len(both.graph.captures) >= (2 if kind in APART else 1)
    assert kind not in TOGETHER or len(both.graph.captures) == 1


class Once(_Linear):
    """Sets itself up in training, by asking a tensor; eval mode never asks."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("is_set_up", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        y = self.into(x)
        if self.training and not self.is_set_up:
            y = y - y.mean()
        return y


class CountedInTraining(_Linear):
    """What it computes in training depends on its calls before."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.into(x)
        if self.training:
            self.calls += 1
            y = y * self.calls
        return y


@pytest.mark.parametrize(
    ("kind", "code"), [(Once, "PSG211"), (CountedInTraining, "PSG217")], ids=["asks", "counts"]
)
def test_what_training_alone_does_is_refused_in_training_alone(
    kind: type[nn.Module], code: str
) -> None:
    both = pair_of(kind().eval(), {"x": torch.randn(3, 4)})
    assert_same(*both.run(torch.randn(5, 4)))
    with pytest.raises(ps.SurgeryError) as caught:
        both.graph.train()(torch.randn(3, 4))
    assert caught.value.code == code
    both.train(False)
    assert_same(*both.run(torch.randn(5, 4)))


def test_a_package_named_after_torch_is_code_like_any_other() -> None:
    names: dict[str, Any] = {"__name__": "torchlike", "nn": nn}
    source = (
        "class Net(nn.Linear):\n"
        "    def forward(self, x):\n"
        "        y = super().forward(x)\n"
        "        if self.training:\n"
        "            return y * 2\n"
        "        return y * 3\n"
    )
    exec(compile(source, f"{Path(torch.__file__).parent}like/net.py", "exec"), names)
    both = pair_of(names["Net"](4, 4).eval(), {"x": torch.randn(3, 4)})
    for mode in (False, True):
        both.train(mode)
        assert_same(*both.run(torch.randn(5, 4)))


def test_folding_gives_what_the_operated_model_gives_in_either_mode() -> None:
    torch.manual_seed(0)
    g = ps.capture(Scaled(), {"x": torch.randn(2, 4)})
    operated = ps.apply(g, ps.parse_rules(RULE), settings={"rank": 2})
    with torch.no_grad():
        for parameter in operated.parameters():
            parameter.add_(0.1)
    folded, x = ps.fold(operated), torch.randn(3, 4)
    for mode in (False, True):
        operated.train(mode)
        folded.train(mode)
        assert torch.allclose(operated(x), folded(x), atol=1e-6)


RULE = """
name: plain_lora
about: A low-rank change of every linear.
with: {rank: 2}
rules:
  - match: linear
    params:
      A: {shape: [rank, in], init: normal(0.02)}
      B: {shape: [out, rank], init: zeros}
    rewrite: y + linear(linear(x, A), B)
    fold: W + B @ A
"""


class Shuffled(_Linear):
    """Draws from numpy in training: what it drew once would be kept."""

    def forward(self, x: Tensor) -> Any:
        order = np.random.permutation(4) if self.training else np.arange(4)
        return self.into(x)[:, torch.as_tensor(order)]


def test_random_numbers_from_elsewhere_are_refused_in_the_mode_that_draws_them() -> None:
    both = pair_of(Shuffled().eval(), {"x": torch.randn(3, 4)})
    assert_same(*both.run(torch.randn(5, 4)))
    with pytest.raises(ps.SurgeryError) as caught:
        both.graph.train()(torch.randn(3, 4))
    assert caught.value.code == "PSG211"
