"""Replays: site functions computed by the site's own nodes.

    attention(q, k, v, mask)    the core: repeated heads, scores, biases, caps, softmax, dropout
    extend(mask, length)        the mask in the model's own kind: added, True to see, True to hide
    expert_linear(x, W)         the product with a matrix for each expert, rows grouped as they are
    norm(h)                     the norm after a residual addition
    token_mean(v)               the mean over the tokens of each sequence

The same code inserts nodes (values are proxies) and infers shapes (values are fake tensors).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import fx

from peftsurgery.anatomy.site import ATEN, Placed, Site
from peftsurgery.anatomy.values import concrete, sizes, value
from peftsurgery.capture.schemas import arguments, op
from peftsurgery.errors import SurgeryError
from peftsurgery.language.kinds import KINDS
from peftsurgery.language.operators import Operator
from peftsurgery.language.site_functions.sites import KEYS, entries, tokens
from peftsurgery.surgery.rewrite.batch_axis import token_mean
from peftsurgery.surgery.rewrite.dtypes import cast
from peftsurgery.surgery.rewrite.expert_product import expert_product
from peftsurgery.surgery.rewrite.layout import as_held, as_seen, is_regular
from peftsurgery.surgery.rewrite.rerun import INPUTS, Region, core_region, find_region

Outside = Callable[[fx.Node], Any]


class Replay:
    """The functions of one site, for one reading of a rule."""

    def __init__(
        self, placed: Placed, outside: Outside, dtype: torch.dtype, given_mask: Any = None
    ) -> None:
        """``outside`` gives the values of the program's nodes; rules compute in ``dtype``.

        ``given_mask`` is what earlier cuts gave to a core that has no mask.
        """
        self.placed, self.site = placed, placed.site
        self.outside, self.dtype, self.given_mask = outside, dtype, given_mask
        self.given: Mapping[fx.Node, Any] = {}
        self.result: Any = None

    def computing_in(self, dtype: torch.dtype) -> Replay:
        """The same site, read by a rule that computes in another dtype."""
        return Replay(self.placed, self.outside, dtype, self.given_mask)

    @property
    def functions(self) -> dict[str, Operator]:
        """The site's functions that differ from their plain definitions."""
        core = (self.attention, self.tokens, self.extend, self.unmasked)
        own = (*core, self.expert_linear, self.norm, self.token_mean)
        kind = KINDS.get(self.site.kind)  # a pattern's is the rule's own; inputs have no nodes
        known = kind.functions if kind and not kind.is_inputs else {}
        return dict(entries(*(f for f in own if f.__name__ in known)))

    def attention(self, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        """Run the core on these queries, keys, values and mask.

        Returns (batch, heads, tokens, head_dim).
        """
        mask = self.mask() if mask is None else mask
        check_lengths(k, mask)
        given = {"q": q, "k": k, "v": v, "mask": mask}
        self.given = {node: self.held(name, given[name]) for name, node in self.inputs.items()}
        result = as_seen(self.site, "o", self.region.run(self.given, self.outside))
        self.result = cast(result, value(self.region.end).dtype, self.dtype)
        return self.result

    @cached_property
    def region(self) -> Region:
        """The core's nodes, fit for more keys. PSG320 if it cannot be run with more."""
        self.check_regular()
        return core_region(self.site)

    def check_regular(self) -> None:
        """Refuse a core whose keys and values have not the layout that rules see. PSG320."""
        if not is_regular(self.site):
            raise SurgeryError(
                "PSG320",
                f"the attention core in '{self.site.module}' does not hold its heads one by one",
                "leave such cores out with `where:`",
            )

    @cached_property
    def inputs(self) -> dict[str, fx.Node]:
        """Inputs of the core by name, with a stand-in for the mask of a core that has none."""
        found = {name: self.site.nodes[name] for name in INPUTS if name in self.site.nodes}
        if "mask" not in found and self.site.facts["op"] == "sdpa":
            found["mask"] = self.region.calls[self.region.end][0][3]
        return found

    def held(self, name: str, given: Any) -> Any:
        """Convert a rule's value to the model's layout and dtype."""
        node = self.site.nodes.get(name)
        if node is None or given is None:
            return given
        return cast(as_held(self.site, name, given), self.dtype, value(node).dtype)

    def mask(self) -> Any:
        """The mask that the core has: None if every query sees every key."""
        if "mask" in self.site.nodes:
            return self.outside(self.site.nodes["mask"])
        if self.given_mask is not None or not is_causal(self.site):
            return self.given_mask
        q, k = (self.outside(self.site.nodes[name]) for name in ("q_operand", "k_operand"))
        shape = [ATEN.sym_size.int(q, -2), ATEN.sym_size.int(k, -2)]
        return ATEN.tril.default(ATEN.new_ones.default(q, shape, dtype=torch.bool))

    def tokens(self, P: Any) -> Any:
        """Keys or values that are no token's. PSG320 if the core cannot be run with more."""
        self.check_regular()
        q = as_seen(self.site, "q", self.outside(self.site.nodes["q"]))
        return ATEN.expand.default(tokens(P), [ATEN.sym_size.int(q, 0), -1, -1, -1])

    def extend(self, mask: Any, length: int) -> Any:
        """The mask for ``length`` more keys on the left, which every query sees."""
        if mask is None:
            return None
        seen = 1 if is_causal(self.site) else sees(self.site)
        return ATEN.constant_pad_nd.default(mask, [length, 0], seen)

    def unmasked(self, k: Any) -> Any:
        """A mask for the keys k, in the model's own kind, that hides none of them."""
        own, keys = self.mask(), ATEN.sym_size.int(k, KEYS)
        if own is None:
            return None
        seen = 1 if is_causal(self.site) else sees(self.site)
        first = ATEN.full_like.default(ATEN.slice.Tensor(own, -1, 0, 1), seen)
        shape = [-1] * (self.mask_dims - 1)
        return ATEN.expand.default(first, [*shape, keys])

    @property
    def mask_dims(self) -> int:
        """How many dimensions the core's mask has; a causal core's own is (queries, keys)."""
        return len(sizes(self.site.nodes["mask"])) if "mask" in self.site.nodes else 2

    def norm(self, h: Any) -> Any:
        """The norm that follows the addition, of h; h itself where none follows."""
        if "normed" not in self.site.nodes:
            return h
        y, end = (self.site.nodes[name] for name in ("y", "normed"))
        given = {y: cast(as_held(self.site, "y", h), self.dtype, value(y).dtype)}
        result = as_seen(self.site, "normed", find_region([y], end).run(given, self.outside))
        return cast(result, value(end).dtype, self.dtype)

    def expert_linear(self, x: Any, W: Any) -> Any:
        """The product of x, or of what has its rows, with one matrix for each expert."""
        return expert_product(self.site, x, W, self.outside, self.dtype)

    def token_mean(self, v: Any) -> Any:
        """The mean of v over the tokens of each sequence."""
        return token_mean(v, self.site, self.placed.program, self.outside)


def check_lengths(k: Any, mask: Any) -> None:
    """Refuse a mask for another number of keys, where both are fake tensors. ValueError.

    Numbers that the graph writes in two ways are equal if they are so in the example.
    """
    if not isinstance(k, torch.Tensor) or not isinstance(mask, torch.Tensor):
        return
    keys, masked = k.shape[KEYS], mask.shape[-1]
    alike = isinstance(keys, int) == isinstance(masked, int)
    if not (alike and concrete(keys) == concrete(masked)):
        raise ValueError(
            f"the mask is for {masked} keys, and there are {keys}: give extend(mask, length) where "
            "keys come before the others, unmasked(k) for no mask"
        )


def is_causal(site: Site) -> bool:
    """Whether a core without a mask is called with ``is_causal``."""
    return "mask" not in site.nodes and arguments(site.nodes["o"]).get("is_causal") is True


def sees(site: Site) -> int:
    """Mask value of a visible key: 0 for additive or hiding masks, 1 for showing ones."""
    mask = site.nodes["mask"]
    if value(mask).dtype != torch.bool:
        return 0
    for user in mask.users:
        if op(user) == "masked_fill":
            return 0
        if op(user) == "where":
            return int(not is_constant(user.args[1]))
    return 1


def is_constant(branch: Any) -> bool:
    """Whether what a `where` chooses is one number."""
    return not isinstance(branch, fx.Node) or value(branch).dim() == 0
