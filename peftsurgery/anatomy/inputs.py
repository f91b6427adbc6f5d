"""The inputs site: embeddings, per-token inputs and logits of a model, in its top graph.

    inputs    embeds     the embeddings of the tokens (batch, tokens, width)
              mask       which tokens are seen (batch, tokens)
              positions  their position ids; types, their segment ids
              labels     the label of every token, where there is one for each
              answer     the label of every text, where there is one for each
              logits     what the model says
              W          the table of embeddings (vocabulary, width)

An encoder-decoder has them for its decoder too (decoder_embeds, ...). The names of arguments are
those that transformers gives to them in every model; which value the tokens are embedded to, and
whether labels belong to tokens, is told by the graph and the capture's conditions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

from torch import fx

from peftsurgery.anatomy.analysis import analyse
from peftsurgery.anatomy.embeddings import given_ids
from peftsurgery.anatomy.model_arguments import ARGUMENTS, TOKENS
from peftsurgery.anatomy.site import Site
from peftsurgery.anatomy.values import fixed_width, is_ancestor, is_tensor, shape, sizes
from peftsurgery.capture import Capture
from peftsurgery.capture.stack import stack_paths


def find_inputs(capture: Capture) -> Site | None:
    """The inputs of a model of tokens; None for a model that takes no tokens."""
    nodes: dict[str, fx.Node] = {}
    sequences = (("", "input_ids"), ("decoder_", "decoder_input_ids"))
    table = None
    for prefix, ids in sequences:
        tokens = _Tokens.find(capture, ids)
        if tokens is not None:
            nodes |= {f"{prefix}{name}": node for name, node in tokens.bound(capture, prefix)}
            table = table or tokens.table
    if "embeds" not in nodes:
        return None
    if table is not None:
        nodes["W"] = table
    labels = _inputs(capture).get("labels")
    is_bound, texts = labels in nodes.values(), sizes(nodes["embeds"])[:1]
    if labels is not None and not is_bound and sizes(labels)[:1] == texts:
        nodes["answer"] = labels
    nodes |= {name: node for name, node in _outputs(capture).items() if name == "logits"}
    embeds = nodes["embeds"]
    facts: dict[str, Any] = {"dtype": embeds.meta["val"].dtype, **fixed_width(embeds)}
    if table is not None:
        facts["vocabulary"] = int(shape(table)[0])
    return Site("inputs", "", None, None, nodes, facts)


def embedded(capture: Capture, ids: str) -> fx.Node | None:
    """The value that the tokens of an argument are embedded to; None if there is none."""
    tokens = _Tokens.find(capture, ids)
    return None if tokens is None else tokens.embeds


@dataclass(frozen=True)
class _Tokens:
    """One of the model's sequences of tokens: the argument that gives it, and its embeddings."""

    given: fx.Node
    embeds: fx.Node
    table: fx.Node | None

    @classmethod
    def find(cls, capture: Capture, ids: str) -> _Tokens | None:
        inputs = _inputs(capture)
        if ids in inputs:
            for site in analyse(capture.top).sites:
                is_table = site.kind == "embedding" and site.role == "embed.tokens"
                if is_table and given_ids(site.nodes["x"]) is inputs[ids]:
                    return cls(inputs[ids], _finished(capture, site), site.nodes["W"])
        given = inputs.get(TOKENS[ids])
        return None if given is None else cls(given, given, None)

    def bound(self, capture: Capture, prefix: str) -> Iterator[tuple[str, fx.Node]]:
        """(name, node) pairs of the embeddings and of everything given per token."""
        yield "embeds", self.embeds
        inputs = _inputs(capture)
        for name in ("mask", "positions", "types"):
            found = inputs.get(ARGUMENTS.get(f"{prefix}{name}", ""))
            if found is not None and is_tensor(found) and len(shape(found)) == 2:
                yield name, found
        labels = inputs.get("labels")
        if labels is not None and is_tensor(labels) and self.owns(capture, prefix, labels):
            yield "labels", labels

    def owns(self, capture: Capture, prefix: str, labels: fx.Node) -> bool:
        """Whether the labels are per token.

        The capture's conditions tie their length to the tokens'.
        """
        arguments = {ARGUMENTS.get(f"{prefix}{name}") for name in ("mask", "positions", "types")}
        longer = {self.given.name, *(name for name in arguments if name)}
        return any(
            _fits(capture, {*longer, labels.name}, change) and not _fits(capture, longer, change)
            for change in (1, -1)
        )


def _fits(capture: Capture, changed: set[str], change: int) -> bool:
    """Whether a call may have so many tokens more in these inputs."""
    leaves = []
    for name, leaf in zip(capture.names, capture.call.leaves, strict=True):
        if name in changed and leaf.ndim > 1:
            shape = (leaf.shape[0], leaf.shape[1] + change, *leaf.shape[2:])
            leaves.append(SimpleNamespace(shape=shape))  # all that the conditions ask of
        else:
            leaves.append(leaf)
    return capture.fits(leaves, capture.mode is True)


def _inputs(capture: Capture) -> dict[str, fx.Node]:
    return {node.name: node for node in capture.top.graph.find_nodes(op="placeholder")}


def _finished(capture: Capture, site: Site) -> fx.Node:
    """The last value that the embedding's own module computes: some scale what they look up."""
    last = site.nodes["y"]
    own = stack_paths(last)
    if not own or own[-1][1] != site.module:
        return last
    for node in capture.top.graph.nodes:
        if stack_paths(node)[-1:] == own[-1:] and is_tensor(node) and is_ancestor(last, node):
            last = node
    return last


def _outputs(capture: Capture) -> dict[str, fx.Node]:
    """The outputs that have a name and are one tensor."""
    keys, children = capture.output.context, capture.output.children()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        return {}
    values = cast("list[Any]", capture.top.graph.output_node().args[0])
    found, position = {}, 0
    for key, child in zip(keys, children, strict=True):
        if child.num_leaves == 1 and is_tensor(values[position]):
            found[key] = values[position]
        position += child.num_leaves
    return found
