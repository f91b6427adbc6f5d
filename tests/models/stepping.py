"""Modules that go step by step over an axis of their input, and how a step may be no repetition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Stepping(nn.Module):
    """A layer over (batch, steps, 4), with a weight before its loop and one behind."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        return self.behind(self.scan(h, h.sigmoid()))

    def scan(self, x: Tensor, decay: Tensor) -> Tensor:
        raise NotImplementedError


class Stacked(Stepping):
    def scan(self, x: Tensor, decay: Tensor) -> Tensor:
        state = torch.zeros_like(x[:, 0])
        outputs = []
        for i in range(x.shape[1]):
            state = decay[:, i] * state + x[:, i] * self.scale
            outputs.append(state)
        return torch.stack(outputs, dim=1)


class Written(Stepping):
    """Writes what it makes into a tensor."""

    def scan(self, x: Tensor, decay: Tensor) -> Tensor:
        _, steps, _ = x.size()
        state, out = torch.zeros_like(x[:, 0]), torch.zeros_like(x)
        for i in range(0, steps):  # noqa: PIE808
            out[:, i] = state + x[:, i]
            state = decay[:, i] * state + x[:, i]
        return out + state.unsqueeze(1)


class TwoStates(Stepping):
    def scan(self, x: Tensor, decay: Tensor) -> Tensor:
        top, below = x[:, 0] * 0, x[:, 0] * 0
        outputs, others = [], []
        for i in range(x.shape[1]):
            greater = torch.maximum(top, x[:, i])
            below = below * torch.exp(top - greater) + decay[:, i]
            top = greater
            outputs.append(below)
            others.append(top.unsqueeze(1))
        return torch.stack(outputs, 1) + torch.cat(others, dim=1)


class OnlyLast(Stepping):
    def scan(self, x: Tensor, decay: Tensor) -> Tensor:
        state = x.mean(1)
        for i in range(x.shape[1]):
            state = decay[:, i : i + 1].squeeze(1) * state + x[:, i]
        return x + state.unsqueeze(1)


class Before(Stepping):
    """Keeps what the state was before each step, and draws random numbers in it."""

    def scan(self, x: Tensor, decay: Tensor) -> Tensor:
        state = x[:, 0] * 0
        outputs = []
        for i in range(x.shape[1]):
            outputs.append(state)
            step = F.dropout(x[:, i], 0.5, self.training)
            state = torch.addcmul(step, decay[:, i], state)
        return torch.stack(outputs, dim=-2)


class Windowed(Stepping):
    """Goes over windows of two steps, the last of which is filled up."""

    def scan(self, x: Tensor, decay: Tensor) -> Tensor:
        parted = F.pad(x, (0, 0, 0, x.shape[1] % 2)).reshape(x.shape[0], -1, 2, 4)
        state = torch.zeros(x.shape[0], 4, 4)
        out = torch.zeros_like(parted)
        for i in range(parted.shape[1]):
            here = parted[:, i]
            out[:, i] = here @ state
            state = state + here.transpose(-1, -2) @ here
        return out.reshape(x.shape[0], -1, 4)[:, : x.shape[1]] * decay


class OfTheStepBefore(Stepping):
    """Reads what it wrote a step before: in the first step, the last place."""

    def scan(self, x: Tensor, decay: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i in range(x.shape[1]):
            out[:, i] = out[:, i - 1] + decay[:, i] * x[:, i]
        return out


KEPT = (Stacked, Written, TwoStates, OnlyLast, Before, Windowed, OfTheStepBefore)
"""Those whose loop is kept."""


class BranchOnFirst(Stepping):
    def scan(self, x: Tensor, decay: Tensor) -> Tensor:
        outputs = []
        for i in range(x.shape[1]):
            state = x[:, i] if i == 0 else decay[:, i] * state + x[:, i]  # noqa: F821
            outputs.append(state)
        return torch.stack(outputs, 1)


class BranchOnFifth(Stepping):
    def scan(self, x: Tensor, decay: Tensor) -> Tensor:
        outputs = []
        for i in range(x.shape[1]):
            outputs.append(x[:, i] * 2 if i == 5 else x[:, i] + decay[:, i])
        return torch.stack(outputs, 1)


class BranchOnOdd(Stepping):
    def scan(self, x: Tensor, decay: Tensor) -> Tensor:
        outputs = []
        for i in range(x.shape[1]):
            if i % 2:
                outputs.append(x[:, i])
            else:
                outputs.append(decay[:, i])
        return torch.stack(outputs, 1)


class BranchOnLast(Stepping):
    def scan(self, x: Tensor, decay: Tensor) -> Tensor:
        state = x[:, 0]
        for i in range(x.shape[1]):
            state = state * decay[:, i]
            if i == x.shape[1] - 1:
                state = state + 1
        return x + state.unsqueeze(1)


class Counting(Stepping):
    """Counts its steps by itself, and does another at the sixth."""

    def scan(self, x: Tensor, decay: Tensor) -> Tensor:
        count, state = 0, x[:, 0]
        for i in range(x.shape[1]):
            state = state + x[:, i] * count
            count += 1  # noqa: SIM113
        return decay * state.unsqueeze(1)


class LookingAtItsList(Stepping):
    def scan(self, x: Tensor, decay: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for i in range(x.shape[1]):
            outputs.append(x[:, i] if len(outputs) != 4 else decay[:, i])
        return torch.stack(outputs, 1)


class ReadingItsList(Stepping):
    def scan(self, x: Tensor, decay: Tensor) -> Tensor:
        outputs = []
        for i in range(x.shape[1]):
            outputs.append(x[:, i] * decay[:, i])
        return torch.stack(outputs, 1) / len(outputs)


class OfTwoStepsBefore(Stepping):
    def scan(self, x: Tensor, decay: Tensor) -> Tensor:
        older, old = x[:, 0], decay[:, 0]
        outputs = []
        for i in range(x.shape[1]):
            older, old = old, older * decay[:, i] + x[:, i]
            outputs.append(old)
        return torch.stack(outputs, 1)


class ReadingTheIndex(Stepping):
    def scan(self, x: Tensor, decay: Tensor) -> Tensor:
        state = x[:, 0]
        for i in range(x.shape[1]):
            state = state * decay[:, i]
        return x * state.unsqueeze(1) + i


class Growing(Stepping):
    def scan(self, x: Tensor, decay: Tensor) -> Tensor:
        seen = x[:, :0]
        for i in range(x.shape[1]):
            seen = torch.cat([seen, x[:, i : i + 1] + seen.sum(1, keepdim=True)], 1)
        return seen * decay


class LeftByValue(Stepping):
    def scan(self, x: Tensor, decay: Tensor) -> Tensor:
        state = x[:, 0]
        for i in range(x.shape[1]):
            state = state * decay[:, i]
            if i > 2:
                break
        return x + state.unsqueeze(1)


class WithALayer(Stepping):
    def scan(self, x: Tensor, decay: Tensor) -> Tensor:
        state = x[:, 0] * 0
        outputs = []
        for i in range(x.shape[1]):
            state = torch.tanh(self.before(state) + x[:, i])
            outputs.append(state)
        return torch.stack(outputs, 1)


class WithAWeight(Stepping):
    def scan(self, x: Tensor, decay: Tensor) -> Tensor:
        state, weight = x[:, 0] * 0, self.behind.weight.t()
        outputs = []
        for i in range(x.shape[1]):
            state = torch.tanh(state @ weight + x[:, i])
            outputs.append(state)
        return torch.stack(outputs, 1)


class WithARemainder(Stepping):
    """Chunks of two steps, the last of which may have one."""

    def scan(self, x: Tensor, decay: Tensor) -> Tensor:
        steps = x.shape[1]
        outputs, state = [], x[:, :1] * 0
        for i in range((steps + 1) // 2):
            here = x[:, 2 * i : min(2 * i + 2, steps)]
            outputs.append(here + state)
            state = state + here.sum(1, keepdim=True)
        return torch.cat(outputs, 1) * decay


class Remembering(Stepping):
    def scan(self, x: Tensor, decay: Tensor) -> Tensor:
        self.steps = 0
        state = x[:, 0]
        for i in range(x.shape[1]):
            self.steps = self.steps + 1
            state = state * decay[:, i] + (1 if self.steps == 6 else 0)
        return x + state.unsqueeze(1)


class FillingALater(Stepping):
    """Its list begins with something, and one place of a list changes in every turn."""

    def scan(self, x: Tensor, decay: Tensor) -> Tensor:
        outputs = [x[:, 0]]
        states = [x[:, 0], decay[:, 0]]
        for i in range(x.shape[1]):
            states[0] = states[0] * states[1] + x[:, i]
            outputs.append(states[0])
        return torch.stack(outputs[1:], 1)


class TakingFromAnother(Stepping):
    """Takes numbers from an iterator, of which the first are alike."""

    def scan(self, x: Tensor, decay: Tensor) -> Tensor:
        state, numbers = x[:, 0], iter([2] * 4 + [3] * 20)
        for i in range(x.shape[1]):
            state = state * decay[:, i] + x[:, i] * next(numbers)
        return x + state.unsqueeze(1)


class CountingElsewhere(Stepping):
    """Counts in a function of its own."""

    def scan(self, x: Tensor, decay: Tensor) -> Tensor:
        state, count = x[:, 0], 0

        def step() -> int:
            nonlocal count
            count += 1
            return 2 if count < 5 else 3

        for i in range(x.shape[1]):
            state = state * decay[:, i] + x[:, i] * step()
        return x + state.unsqueeze(1)


class Tally:
    def __init__(self) -> None:
        self.count = 0

    def step(self) -> int:
        """How much more a step is worth, which changes with the fifth."""
        self.count += 1
        return 2 if self.count % 13 < 5 else 3


class CountingInAnother(Stepping):
    """Counts in an object that it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.tally = Tally()

    def scan(self, x: Tensor, decay: Tensor) -> Tensor:
        self.tally.count = 0
        return self.steps(x, decay)

    def steps(self, x: Tensor, decay: Tensor) -> Tensor:
        state = x[:, 0]
        for i in range(x.shape[1]):
            state = state * decay[:, i] + x[:, i] * self.tally.step()
        return x + state.unsqueeze(1)


class OverWindows(Stepping):
    """Two loops, one within the other."""

    def scan(self, x: Tensor, decay: Tensor) -> Tensor:
        state = x[:, 0]
        for i in range(x.shape[1]):
            for j in range(x.shape[1]):
                state = state * decay[:, j] + x[:, i]
        return x + state.unsqueeze(1)


STEP_BY_STEP = (
    *(BranchOnFirst, BranchOnFifth, BranchOnOdd, BranchOnLast, Counting, LookingAtItsList),
    *(ReadingItsList, OfTwoStepsBefore, ReadingTheIndex, Growing, LeftByValue),
    *(WithALayer, WithAWeight, WithARemainder, Remembering, FillingALater, OverWindows),
    *(TakingFromAnother, CountingElsewhere, CountingInAnother),
)
"""Those in which a step is no repetition, or not known to be one."""


class Layers(nn.Module):
    """Two layers of torch's over steps."""

    def __init__(self, kind: type[nn.RNNBase], **settings: bool) -> None:
        super().__init__()
        self.first = kind(4, 3, 2, dropout=0.5, **settings)
        self.last = nn.Linear(6 if settings.get("bidirectional") else 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        out, state = self.first(x)
        state = state[0] if isinstance(state, tuple) else state
        return self.last(out) + state.mean()
