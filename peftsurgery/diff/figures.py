"""measure: what a model costs at a given shape, counted by running its graphs without data.

Every program runs once on the meta device for each shape it is called with, so that a deep model
costs what its distinct blocks cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Any, cast

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from peftsurgery.capture import Capture, GraphModel, Program
from peftsurgery.capture.loops.running import as_run
from peftsurgery.capture.names import join
from peftsurgery.diff.describing import served
from peftsurgery.diff.description import Description
from peftsurgery.errors import SurgeryError, first_line


@dataclass(frozen=True)
class Figures:
    """The headline of a model.

    ``flops`` are those of matrix products, convolutions and attention in one forward, 2 for each
    multiplication and addition; ``activation_bytes`` are all values that are computed and are no
    views, as training without recomputation keeps them. Both are for inputs of the shapes ``at``,
    and None where the graph depends on data. ``bytes`` are those of parameters and buffers.
    """

    nodes: int
    parameters: int
    trainable: int
    bytes: int
    flops: int | None
    activation_bytes: int | None
    at: str

    def to_dict(self) -> dict[str, Any]:
        """The figures by name."""
        return asdict(self)


def measure(
    model: GraphModel, description: Description, shape: tuple[int, int] | None = None
) -> Figures:
    """The figures of a model; ``shape`` is (batch, tokens) instead of the capture's example.

    PSG904 for a shape that the model does not run at.
    """
    once = {each.tied: each for each in description.tensors.values()}.values()
    parameters = [each for each in once if each.kind == "parameter"]
    capture = served(model)
    inputs = _inputs(capture, shape)
    run = _Run(capture, model)
    cost = run.cost(inputs)
    return Figures(
        nodes=description.count,
        parameters=sum(each.count for each in parameters),
        trainable=sum(each.count for each in parameters if each.trained),
        bytes=sum(each.count * getattr(torch, each.dtype).itemsize for each in once),
        flops=None if cost is None else cost[0],
        activation_bytes=None if cost is None else cost[1],
        at=", ".join(
            f"{name} {list(leaf.shape)}"
            for name, leaf in zip(capture.names, inputs, strict=False)
            if isinstance(leaf, torch.Tensor)
        ),
    )


def _inputs(capture: Capture, shape: tuple[int, int] | None) -> list[Any]:
    """The example's values on meta; sizes that vary are as ``shape`` has them."""
    leaves = list(capture.call.leaves)
    if shape is None:
        return leaves
    found = []
    for node, leaf in zip(capture.top.graph.find_nodes(op="placeholder"), leaves, strict=False):
        value = node.meta.get("val")
        if isinstance(leaf, torch.Tensor) and isinstance(value, torch.Tensor):
            sizes = [
                shape[dim] if dim < len(shape) and isinstance(size, torch.SymInt) else there
                for dim, (size, there) in enumerate(zip(value.shape, leaf.shape, strict=True))
            ]
            leaf = torch.empty(sizes, dtype=leaf.dtype, device="meta")
        found.append(leaf)
    return found


class _Run:
    """Runs the programs of a capture on meta, each once for equal arguments."""

    def __init__(self, capture: Capture, model: GraphModel) -> None:
        self.programs = capture.programs
        self.model = model
        self.counter = FlopCounterMode(display=False)
        self.again = 0  # of programs that did not run again
        self.bytes = 0
        self.known: dict[Any, tuple[Any, int, int]] = {}

    def cost(self, inputs: Sequence[Any]) -> tuple[int, int] | None:
        """Operations and bytes; None if something asks for a value, which meta does not have.

        PSG904 for inputs of a shape that the model does not run at.
        """
        try:
            with torch.no_grad(), self.counter:
                self.run("", self.programs[""][0], inputs)
        except NotImplementedError:
            return None
        except RuntimeError as error:
            if "meta" in str(error):
                return None
            message = f"the model does not run at this shape: {first_line(error)}"
            raise SurgeryError("PSG904", message, "give another one as shape=") from error
        return self.flops, self.bytes

    @property
    def flops(self) -> int:
        return int(self.counter.get_total_flops()) + self.again

    def run(self, path: str, program: Program, inputs: Sequence[Any]) -> Any:
        key = program.label, repr([_kind(each) for each in pytree.tree_leaves(list(inputs))])
        if key in self.known:
            result, flops, size = self.known[key]
            self.again += flops
            self.bytes += size
            return result
        before = self.flops, self.bytes
        result = self.execute(path, program, inputs)
        self.known[key] = result, self.flops - before[0], self.bytes - before[1]
        return result

    def execute(self, path: str, program: Program, inputs: Sequence[Any]) -> Any:
        values: dict[fx.Node, Any] = {}
        given = iter(inputs)
        held: set[int] = set()
        for node in as_run(program.graph, values):
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            match node.op:
                case "placeholder":
                    values[node] = next(given)
                case "get_attr":
                    values[node] = self.read(join(path, str(node.target)))
                case "call_module":
                    values[node] = self.call(path, node, args)
                case "output":
                    return args[0]
                case "call_method":
                    values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
                case _:
                    target: Any = node.target
                    values[node] = target(*args, **kwargs)
            storages = {_storage(x) for x in pytree.tree_leaves(values[node]) if _is_tensor(x)}
            if node.op in ("call_function", "call_method"):
                self.bytes += sum(size for key, size in storages if key not in held)
            held |= {key for key, _ in storages}
        return None

    def read(self, name: str) -> Any:
        """What a graph reads of its module: a tensor's like on meta, a dropout's rate itself."""
        value: Any = reduce(getattr, name.split("."), cast("Any", self.model))
        is_tensor = isinstance(value, torch.Tensor)
        return torch.empty_like(value, device="meta") if is_tensor else value

    def call(self, path: str, node: fx.Node, args: Sequence[Any]) -> Any:
        child = join(path, str(node.target))
        label = node.kwargs["program"]
        return self.run(child, next(p for p in self.programs[child] if p.label == label), args)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _storage(tensor: torch.Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage._cdata, storage.nbytes()


def _kind(value: Any) -> Any:
    return (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else value
