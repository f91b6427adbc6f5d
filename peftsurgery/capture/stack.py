"""Where in the module tree a node of an exported graph comes from."""

from __future__ import annotations

from torch import fx


def stack_paths(node: fx.Node) -> list[tuple[str, str]]:
    """The modules whose forward made ``node``, outermost first: (call key, path in the model)."""
    stack = node.meta.get("nn_module_stack") or {}
    return [(key, path) for key, (path, _) in stack.items() if not key.startswith("_empty")]


def inherit(node: fx.Node, source: fx.Node) -> None:
    """Give an inserted node the origin of the node it serves: splitting keeps them together."""
    for key in ("nn_module_stack", "stack_trace"):
        if key in source.meta:
            node.meta[key] = source.meta[key]
