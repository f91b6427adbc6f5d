"""What a captured graph writes to: its own values and buffers, never what the user's model holds.

A captured model has buffers of its own, so it may count and average in them. Its parameters are the
user's memory, and so are tensors that a module keeps as plain attributes.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from peftsurgery.capture.program import TensorInfo
from peftsurgery.capture.schemas import overwritten, shares_memory
from peftsurgery.errors import SurgeryError


def check_writes(graph: fx.Graph, tensors: Mapping[str, TensorInfo], name: str) -> None:
    """Refuse a graph that writes to a parameter or to a constant. PSG217."""
    for node in graph.nodes:
        for source in overwritten(node):
            root = _root(source)
            info = tensors.get(str(root.target)) if root.op == "get_attr" else None
            if root.op != "get_attr" or (info is not None and not info.parameter):
                continue
            what = (
                "a tensor that is no buffer" if info is None else f"its parameter '{root.target}'"
            )
            raise SurgeryError(
                "PSG217",
                f"{name} writes to {what} in its forward",
                "call the model once in this mode before capturing it, if it does so only once; "
                "register what it remembers as a buffer",
            )


def _root(node: fx.Node) -> fx.Node:
    """What a value is a view of, as far as the schemas of its operators say."""
    while node.op == "call_function" and node.all_input_nodes:
        if shares_memory(node.target) is False:
            break
        node = node.all_input_nodes[0]
    return node
