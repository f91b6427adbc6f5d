"""Routers: the linears whose output chooses which experts compute.

    chosen = topk(softmax(linear(x, W)))       W has a row for each expert
    y = the chosen experts' outputs, weighted

A choice is a topk, a maximum or a sort of values that come from one linear and nothing else with a
weight, along the rows of that linear. It is one of experts if what it says, or its weights, meet a
product with one matrix for each expert, or the outputs of other linears or blocks. Tokens that are
picked by it say no more which expert was chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import fx

from peftsurgery.anatomy.flow import Flow
from peftsurgery.anatomy.ops import Trait, has
from peftsurgery.anatomy.roles import Assignment
from peftsurgery.anatomy.site import Site
from peftsurgery.anatomy.values import backward, fixed, operands, parameter_of, shape
from peftsurgery.capture.schemas import arguments, op
from peftsurgery.reach import reach


def router_roles(flow: Flow) -> list[Assignment]:
    """The routers of a program."""
    found = {router: None for node in flow.nodes for router in _routers(flow, node)}
    return [Assignment(router, "moe.router") for router in found]


def _routers(flow: Flow, choice: fx.Node) -> Iterator[Site]:
    """The linear whose output a node chooses experts by, if it does."""
    if not has(choice, Trait.CHOICE) or not flow.is_signal(choice.all_input_nodes[0]):
        return
    way = backward(operands(choice)[:1], lambda n: _ends(flow, n))
    weighted = [n for n in way if _ends(flow, n)]
    scores = {flow.products[n] for n in weighted if n in flow.products}
    if len(scores) == 1 and len(scores) == len(weighted):
        router = scores.pop()
        if (
            router.kind == "linear"
            and router.facts["out"] > 1
            and _is_along_rows(choice, router)
            and _meets_experts(flow, choice, router)
        ):
            yield router


def _is_along_rows(choice: fx.Node, router: Site) -> bool:
    """Whether it chooses among a linear's rows, or among groups of them: not among tokens."""
    sizes, dim = shape(choice.all_input_nodes[0]), arguments(choice).get("dim")
    # among all values, or between two tensors, there is no dim
    size = fixed(sizes[dim]) if isinstance(dim, int) and -len(sizes) <= dim < len(sizes) else None
    return size is not None and size > 1 and int(router.facts["out"]) % size == 0


def _ends(flow: Flow, node: fx.Node) -> bool:
    """Whether a walk ends at a node: at weights, blocks and what the program is given."""
    return node in flow.products or node.op in ("call_module", "placeholder")


def _meets_experts(flow: Flow, choice: fx.Node, router: Site) -> bool:
    """Whether a choice selects experts, or weighs their outputs."""
    chosen = {choice}

    def users(node: fx.Node) -> Iterator[fx.Node]:
        for user in node.users:
            if not _picks_tokens(user, chosen, router):
                chosen.add(user)
                yield user

    def is_lost(node: fx.Node) -> bool:
        """Whether the walk ends at a node: behind another linear, a choice is no longer visible."""
        return node in flow.products or op(node) in ("embedding", "add")

    for node in reach(users(choice), users, is_lost):
        site = flow.products.get(node)
        if node.op == "call_module" or (site is not None and site.kind == "experts"):
            return True
        weighs = site is None and op(node) in ("mul", "where")
        if weighs and _are_outputs(flow, node, chosen, router):
            return True
    return False


def _picks_tokens(node: fx.Node, chosen: set[fx.Node], router: Site) -> bool:
    """Whether chosen indices pick entries of a value without an axis per expert.

    A table with a vector for each is one of codes, and not of experts.
    """
    if not has(node, Trait.PICK) or node.args[0] in chosen or not isinstance(node.args[0], fx.Node):
        return False
    source, where = node.args[0], node.args[1]
    sizes, dims = shape(source), [where]
    if isinstance(where, Sequence):
        dims = [dim for dim, index in enumerate(where) if index in chosen]
    known = [fixed(sizes[dim]) for dim in dims if isinstance(dim, int)]
    per_expert = router.facts["out"] in known
    is_vectors = parameter_of(source)[0] is not None and len(sizes) < 3
    return not per_expert or is_vectors


def _are_outputs(flow: Flow, weighing: fx.Node, chosen: set[fx.Node], router: Site) -> bool:
    """Whether the values weighed or picked by a choice are outputs of linears or blocks."""
    others = [node for node in operands(weighing) if node not in chosen]
    ends = [list(backward([node], lambda n: _ends(flow, n))) for node in others]
    return len(others) == len(operands(weighing)) - 1 and all(
        any(n.op == "call_module" or flow.products.get(n, router) is not router for n in found)
        for found in ends
    )
