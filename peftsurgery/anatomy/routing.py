"""Routers: the linears whose output chooses which experts compute.

    chosen = topk(softmax(linear(x, W)))       W has a row for each expert
    y = the chosen experts' outputs, weighted

A choice is a topk, a maximum or a sort of values that come from one linear and nothing else with a
weight. It is one of experts if what it says, or its weights, meet a product with one matrix for
each expert, or the outputs of other linears or blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from .flow import Flow
from .roles import Part
from .site import Site
from .values import backward, op, operands, words

CHOICES = words("topk argmax sort argsort max")
WEIGHINGS = words("mul mul_ where")


def router_parts(flow: Flow) -> list[Part]:
    """The routers of a program."""
    found = {router: None for node in flow.nodes for router in _routers(flow, node)}
    return [Part(router, "moe.router") for router in found]


def _routers(flow: Flow, choice: fx.Node) -> Iterator[Site]:
    """The linear whose output a node chooses experts by, if it does."""
    if op(choice) not in CHOICES or not flow.is_signal(choice.all_input_nodes[0]):
        return
    weighted = [
        n for n in backward(operands(choice)[:1], lambda n: _ends(flow, n)) if _ends(flow, n)
    ]
    scores = {flow.products[n] for n in weighted if n in flow.products}
    if len(scores) == 1 and len(scores) == len(weighted):
        router = scores.pop()
        if (
            router.kind == "linear"
            and router.facts["out"] > 1
            and _meets_experts(flow, choice, router)
        ):
            yield router


def _ends(flow: Flow, node: fx.Node) -> bool:
    """Whether a walk ends at a node: at weights, blocks and what the program is given."""
    return node in flow.products or node.op in ("call_module", "placeholder")


def _meets_experts(flow: Flow, choice: fx.Node, router: Site) -> bool:
    """Whether what is chosen goes on to experts, or is multiplied with what they gave."""
    seen, stack = {choice}, [choice]
    while stack:
        node = stack.pop()
        for user in node.users:
            if user in seen:
                continue
            seen.add(user)
            site = flow.products.get(user)
            if site is not None or user.op == "call_module":
                if user.op == "call_module" or (site is not None and site.kind == "experts"):
                    return True
                continue  # another linear: the choice has been lost in a signal
            if op(user) in WEIGHINGS and _are_outputs(flow, user, seen, router):
                return True
            if op(user) not in ("embedding", "add", "add_"):
                stack.append(user)
    return False


def _are_outputs(flow: Flow, weighing: fx.Node, chosen: set[fx.Node], router: Site) -> bool:
    """Whether what is weighed, or picked from, by the chosen are outputs of linears or blocks."""
    others = [node for node in operands(weighing) if node not in chosen]
    ends = [list(backward([node], lambda n: _ends(flow, n))) for node in others]
    return len(others) == len(operands(weighing)) - 1 and all(
        any(n.op == "call_module" or flow.products.get(n, router) is not router for n in found)
        for found in ends
    )
