"""Parameter sites: every parameter that a program reads, with what it is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from peftsurgery.anatomy.flow import Flow
from peftsurgery.anatomy.made_weights import made_of
from peftsurgery.anatomy.ops import Trait, has
from peftsurgery.anatomy.site import Site
from peftsurgery.anatomy.values import shape
from peftsurgery.capture import TensorInfo
from peftsurgery.capture.schemas import op
from peftsurgery.reach import reach


def find_parameters(
    flow: Flow, tensors: Mapping[str, TensorInfo], sites: Sequence[Site]
) -> list[Site]:
    """A site for every parameter of a program; the fact ``kind`` says what it is for.

    The table of an embedding has its role, and so has what is tied to it.
    """
    uses: dict[str, tuple[str, str]] = {}
    roles = {site.parameter: site.role for site in sites if site.kind == "embedding"}
    ties = {tensors[str(name)].tied: role for name, role in roles.items()}
    for site in sites:
        kinds = {"W": "weight" if site.kind in ("linear", "conv", "experts") else site.kind}
        kinds["b"] = "bias"
        for made in made_of(site).values():
            uses |= {name: ("weight", site.kind) for name in made if name not in uses}
        for name, kind in kinds.items():
            node = site.nodes.get(name)
            if node is not None:
                uses.setdefault(str(node.target), (kind, site.kind))
    found: dict[str, Site] = {}
    for node in flow.nodes:
        name = str(node.target)
        info = tensors.get(name) if node.op == "get_attr" else None
        if info is None or not info.parameter or name in found:
            continue
        kind, owner = uses.get(name) or (_kind(node), "other")
        facts = {"kind": kind, "of": owner, "shape": info.shape, "dtype": info.dtype}
        facts["tied"] = info.tied
        role = ties.get(info.tied) if info.tied else roles.get(name)
        if owner == "other":
            facts["read_by"] = tuple(dict.fromkeys(op(user) for user in _readers(node)))
        if info.shape:
            facts |= {"rows": info.shape[0], "columns": info.shape[-1]}
        module = name.rpartition(".")[0]
        found[name] = Site("parameter", module, role, name, {"W": node}, facts)
    return list(found.values())


def _readers(node: fx.Node) -> list[fx.Node]:
    """What reads a parameter, behind views and casts."""
    way = reach([node], lambda n: n.users, lambda n: n is not node and not _is_seen_through(n))
    return [n for n in way if n is not node and not _is_seen_through(n)]


def _is_seen_through(node: fx.Node) -> bool:
    return has(node, Trait.VIEW | Trait.CAST)


def _kind(node: fx.Node) -> str:
    """Say bias for a vector that is added to something, else other."""
    users = list(node.users)
    added = Trait.ADDITION | Trait.RESHAPE | Trait.CAST
    is_added = users and all(has(user, added) for user in users)
    return "bias" if is_added and len(shape(node)) == 1 else "other"
