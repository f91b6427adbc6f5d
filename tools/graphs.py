"""Operated graphs as text: what ten architectures become under eight rules, to be compared.

    python -m tools.graphs OUT          one file for each architecture and rule
    diff -r OUT OTHER                   what a change of the package changed in them

A file holds the report, every program of the operated model node by node, the names, shapes and
hashes of what was added, what the model returns with the parameters moved from their start, and,
for what can be folded, the hashes of the folded weights. Node names are in it; ``--no-names``
numbers the nodes in order instead, for a change that makes the same nodes under other names.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

import peftsurgery as ps
from tests.models.zoo import entry

ARCHITECTURES = (
    *("bert", "gpt2", "llama", "t5", "bart", "gpt_neox", "falcon_7b", "qwen2_moe"),
    *("vit", "transformer_encoder"),
)
RULES = (
    *("lora_qv", "lora_all_linear", "houlsby", "prefix_tuning", "ia3", "bitfit", "unipelt"),
    "prompt_tuning",
)


def main() -> None:
    """Write the graphs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--no-names", action="store_true", help="number the nodes")
    parser.add_argument("--only", nargs="*", default=ARCHITECTURES, help="these architectures")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.only:
        inputs = entry(name).inputs(2, 6)
        graph = ps.capture(entry(name).build(), inputs=inputs)
        for rule in RULES:
            lines = described(graph, rule, inputs, not given.no_names)
            text = "\n".join(lines) + "\n"
            (given.out / f"{name}.{rule}.txt").write_text(text, encoding="utf-8")


def described(
    graph: ps.GraphModel, rule: str, inputs: dict[str, Tensor], names: bool
) -> Iterator[str]:
    """The lines about one rule on one model; the refusal alone if it is refused."""
    torch.manual_seed(0)
    try:
        operated = ps.apply(graph, rule, exact=True)
    except ps.SurgeryError as error:
        yield str(error)
        return
    yield str(operated.report)
    base = dict(graph.named_parameters())
    generator = torch.Generator().manual_seed(0)
    for name, parameter in operated.named_parameters():
        if name not in base or parameter.requires_grad:
            yield f"{name} {tuple(parameter.shape)} {parameter.dtype} {summed(parameter)}"
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(0.1 * noise)
    yield from outputs("eval", operated.eval()(**inputs))
    torch.manual_seed(1)
    yield from outputs("train", operated.train()(**inputs))
    operated.eval()
    for capture in operated.captures:
        for path, programs in capture.programs.items():
            for program in programs:
                yield f"== {path or 'top'}: {program.label}"
                yield from nodes(program.graph, names)
    try:
        folded = ps.fold(operated)
    except ps.SurgeryError as error:
        yield str(error)
    else:
        yield from (f"folded {name} {summed(value)}" for name, value in folded.state_dict().items())


def outputs(mode: str, value: Any) -> Iterator[str]:
    """A line for each tensor that a model returned."""
    for place, leaf in pytree.tree_leaves_with_path(value):
        if isinstance(leaf, Tensor):
            yield f"{mode}{pytree.keystr(place)} {tuple(leaf.shape)} {summed(leaf)}"


def nodes(graph: fx.Graph, names: bool) -> Iterator[str]:
    """A line for each node: its name or number, what it does, and with what."""
    called = {node: node.name if names else f"%{i}" for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _Named(called[n]))
        what = target(node) if names or node.op != "placeholder" else ""
        yield f"{called[node]} = {node.op} {what} {args} {kwargs}"


def target(node: fx.Node) -> str:
    """What a node calls or reads: a function by its name, which is the same in every run."""
    if isinstance(node.target, str | torch._ops.OpOverload):
        return str(node.target)
    return node.target.__name__


class _Named(str):
    """A text that shows itself without quotes."""

    def __repr__(self) -> str:
        return str(self)


def summed(value: Tensor) -> str:
    """The hash of a tensor's bytes."""
    data = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(data, digest_size=8).hexdigest()


if __name__ == "__main__":
    main()
