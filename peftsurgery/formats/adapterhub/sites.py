"""Where an adapter of AdapterHub's is: from config keys to sites, and from sites to config keys.

linears                 selfattn_lora with attn_matrices, intermediate_lora, output_lora
residual additions      mh_adapter after self-attention, output_adapter after the feed-forward
attention cores         every self-attention
all of them             but for the layers in leave_out
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import copy
from typing import Any

from peftsurgery.anatomy import Placed, survey
from peftsurgery.capture import GraphModel
from peftsurgery.capture.names import join
from peftsurgery.errors import SurgeryError
from peftsurgery.formats.adapterhub.layout import (
    INPUTS,
    LINEARS,
    MATRICES,
    found_layout,
    is_input,
    listed_layout,
)
from peftsurgery.formats.adapterhub.library import layouts


class HubSites:
    """The sites of a model that the library can put something at, under its names for them."""

    def __init__(self, model: GraphModel) -> None:
        """The sites with the names that the table has; others are told by what is read."""
        module: Any = model.source.module
        self.config = getattr(module, "config", None)
        self.model_type = str(getattr(self.config, "model_type", type(module).__name__))
        self.prefix = f"{getattr(module, 'base_model_prefix', '')}."
        self.headed = hasattr(module, self.prefix[:-1])
        self.every = list(survey(model.base_capture))
        self.layers = sorted({site.layer for site in self.every if site.layer is not None})
        self.layout = listed_layout(self.model_type)

    def told(self, keys: Iterable[str], flags: Collection[str]) -> HubSites:
        """The same with the names that the keys of an adapter tell, if the table has none.

        ``flags`` are the linears that the adapter's config asks for. PSG513 where a key tells none.
        """
        if self.model_type in layouts():
            return self
        blocks = {self.plain(s.block): s.block for s in self.every if s.layer is not None}
        told = copy(self)
        told.layout = found_layout(keys, self.every, blocks, flags)
        return told

    def called(self, part: str) -> str:
        """The library's name for a part of a layer. PSG513 if it is not known."""
        name: str | None = getattr(self.layout, part)
        if name is None:
            message = f"AdapterHub's name for the {part} of a layer of a '{self.model_type}'"
            hint = f"no tensor names it, and known are those of {', '.join(layouts())}"
            raise SurgeryError("PSG513", f"{message} is not known", hint)
        return name

    def meant(self, kind: str, keys: Mapping[str, Any]) -> list[Placed]:
        """The sites of a kind that config keys mean."""
        wanted = self._test(kind, keys)
        left_out = set(keys.get("leave_out") or ())
        here = [s for s in self.every if s.kind == kind and s.layer is not None]
        return [s for s in here if s.layer not in left_out and wanted(s)]

    def said(self, kind: str, sites: Iterable[Placed]) -> dict[str, Any]:
        """The config keys that mean sites of a kind. PSG512 if none mean just these."""
        sites = list(sites)
        layers = {site.layer for site in sites}
        keys: dict[str, Any] = {"leave_out": [n for n in self.layers if n not in layers]}
        here = {part for part in self._parts(kind) if any(self._is(part, site) for site in sites)}
        if kind == "linear":
            matrices = [name for name in MATRICES if f"attn.{name}" in here]
            keys |= {"selfattn_lora": bool(matrices), "attn_matrices": matrices}
            keys |= {f"{name}_lora": name in here for name in LINEARS}
        if kind == "residual":
            keys |= {"mh_adapter": "attention" in here, "output_adapter": "ffn" in here}
        meant = self.meant(kind, keys)
        odd = odd_one(sites, meant)
        if odd is not None:
            what = "is adapted" if odd in sites else "is not adapted"
            message = f"'{odd.module}' {what}, which AdapterHub's config has no words for"
            raise SurgeryError("PSG512", message, "it can leave out whole layers, for all kinds")
        return keys

    def holder(self, placed: Placed) -> str:
        """The module that holds the library's tensors for a site."""
        if placed.kind == "residual":
            part = "attention" if self._is("attention", placed) else "ffn"
            return join(placed.block, self.called(part))
        if placed.kind == "attention":
            return join(placed.block, self.called("prefix"))
        return placed.module

    def key(self, placed: Placed, suffix: str, name: str) -> str:
        """The key of a tensor of a site, without the base model's name; see ``library.yaml``."""
        holder = "" if suffix.startswith("/") else self.plain(self.holder(placed))
        return join(holder, suffix.lstrip("/").replace("*", name))

    def plain(self, key: str) -> str:
        """A tensor's name without the name of the base model: classes with heads put it before."""
        return key.removeprefix(self.prefix)

    def full(self, key: str) -> str:
        """A tensor's name as this model's class would have it."""
        return f"{self.prefix}{self.plain(key)}" if self.headed else self.plain(key)

    def _test(self, kind: str, keys: Mapping[str, Any]) -> Callable[[Placed], bool]:
        parts: set[str] = set(self._parts(kind))
        if kind == "linear":
            flags = {name for name in LINEARS if keys.get(f"{name}_lora")}
            matrices = keys.get("attn_matrices") if keys.get("selfattn_lora") else ()
            parts = flags | {f"attn.{name}" for name in matrices or ()}
        if kind == "residual":
            names = {"attention": "mh_adapter", "ffn": "output_adapter"}
            parts = {part for part, key in names.items() if keys.get(key)}
        return lambda site: any(self._is(part, site) for part in parts)

    def _parts(self, kind: str) -> Sequence[str]:
        """The words for the sites of a kind in a layer."""
        if kind == "linear":
            return (*INPUTS, *LINEARS)
        return ("attention", "ffn") if kind == "residual" else ("self",)

    def _is(self, part: str, site: Placed) -> bool:
        """Whether a site is what a word means in its layer."""
        if site.kind == "linear" and (part in INPUTS or is_input(site)):
            return site.role == part
        if site.kind == "linear":
            return site.module == join(site.block, self.called(part))
        if site.kind == "residual":
            return site.facts.get("after") == part and site.facts.get("kind", "self") == "self"
        return site.facts.get("kind") == part


def odd_one(some: Sequence[Placed], others: Sequence[Placed]) -> Placed | None:
    """A site that is in one list only."""
    here, there = ({(site.block, site.site) for site in sites} for sites in (some, others))
    both = here & there
    return next((s for s in [*some, *others] if (s.block, s.site) not in both), None)
