"""How peft keeps the factors of all matrices of a stack in two matrices.

A is (experts * rank, in), expert by expert, and B is (out, rank * experts), rank by rank. Which
size of a stack is ``in``, the module's attribute ``is_transposed`` tells peft (0.21.2): the second
if it is true, else the last. Where that is not how the model multiplies, B A is the update of the
transposed matrices: the factors change places.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from peftsurgery.formats.peft.library import FORMAT, peft_words
from peftsurgery.surgery.plan.cut import Cut

TRANSPOSED = "is_transposed"


@dataclass(frozen=True)
class StackLayout:
    """The sizes of a stack as peft sees it; ``is_crossed`` if its in is the model's out."""

    experts: int
    rank: int
    in_: int
    out: int
    is_crossed: bool

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of peft's A and B."""
        return (self.experts * self.rank, self.in_), (self.out, self.rank * self.experts)

    def split(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of each expert: A (experts, rank, in) and B (experts, out, rank)."""
        A = A.reshape(self.experts, self.rank, self.in_)
        B = B.reshape(self.out, self.rank, self.experts).permute(2, 0, 1)
        A, B = (B.mT, A.mT) if self.is_crossed else (A, B)
        return A.contiguous(), B.contiguous()

    def join(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The A and B of peft, of the factors of each expert: the inverse of :meth:`split`."""
        A, B = (B.mT, A.mT) if self.is_crossed else (A, B)
        return A.flatten(0, 1).contiguous(), B.permute(1, 2, 0).flatten(1).contiguous()


def layout_of(cut: Cut, model: nn.Module) -> StackLayout:
    """The layout of an adapter of a stack."""
    facts, rank = cut.placed.facts, cut.operation.file.carried(FORMAT)[peft_words().parts["added"]]
    is_crossed = ("W" in cut.site.turned) != _is_transposed(cut, model)
    pair = (facts["out"], facts["in"]) if is_crossed else (facts["in"], facts["out"])
    return StackLayout(facts["experts"], cut.numbers[rank], *pair, is_crossed)


def _is_transposed(cut: Cut, model: nn.Module) -> bool:
    return bool(getattr(model.get_submodule(cut.placed.module), TRANSPOSED, False))


def uncertain(cut: Cut, model: nn.Module) -> str | None:
    """Reason why the layout of an adapter does not say its update; None if it does.

    Early versions of peft took every stack for (experts, in, out), whatever the module says of it;
    of matrices that are not square the tensors' shapes tell which was meant. A stack of one matrix
    has an update of its own there, without the axis of experts.
    """
    facts, given = cut.placed.facts, [cut.rule.params[name] for name in cut.rule.suffixes(FORMAT)]
    rank = cut.operation.file.carried(FORMAT).get(peft_words().parts["added"])
    shapes = [[expression.text for expression in param.shape] for param in given]
    if shapes != [["experts", rank, "in"], ["experts", "out", rank]]:
        return "is adapted by other parameters than two factors of a rank"
    if facts["experts"] == 1:
        return "is a stack of one matrix, which peft takes for no stack"
    if facts["in"] == facts["out"] and not _is_transposed(cut, model):
        return "has square matrices, whose update versions of peft transpose or do not"
    return None
