"""Shape checks: cuts evaluated over fake tensors, before any rewriting."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher

from peftsurgery.anatomy.site import Site, features_dim
from peftsurgery.errors import SurgeryError
from peftsurgery.language.readings import rewrite
from peftsurgery.surgery.plan.cut import Cut
from peftsurgery.surgery.rewrite.environment import FakeDomain, environment
from peftsurgery.surgery.rewrite.layout import as_seen


def unlike(cuts: Iterable[Cut]) -> Iterator[Cut]:
    """Cuts without those that do at a site what another adapter does there, with the same sizes.

    Thirty adapters of one rule have one shape at a site.
    """
    seen: dict[Site, list[tuple[Any, ...]]] = {}
    for cut in cuts:
        known, done = seen.setdefault(cut.site, []), (cut.rule, cut.numbers, cut.over)
        if done not in known:
            known.append(done)
            yield cut


def check_shapes(cut: Cut) -> None:
    """Evaluate a cut over fake tensors: PSG306 if the new value has another shape.

    PSG305 if the site has nothing of the name that is rewritten (a mask, a bias).
    """
    for name in cut.rule.rewrite:
        if name not in cut.site.nodes:
            message = f"{cut.operation.name} rewrites '{name}', and {cut.placed.module} has none"
            raise SurgeryError("PSG305", message, "leave such sites out with `where:`")
    for name, value in _fake_rewrite(cut).items():
        if cut.rule.kind.lengthens:
            continue
        expected = cut.site.nodes[name].meta["val"]
        if cut.site.taken is not None and name == cut.rule.kind.result:
            expected = cut.site.taken.take(expected, features_dim(cut.site))
        expected = as_seen(cut.site, name, expected)
        if tuple(value.shape) != tuple(expected.shape):
            raise SurgeryError(
                "PSG306",
                f"{cut.operation.name} at {cut.placed.module}: the new {name} has shape "
                f"{list(value.shape)}, where {list(expected.shape)} is needed",
            )


def _fake_rewrite(cut: Cut) -> dict[str, torch.Tensor]:
    """Evaluate a cut's rewrite over fake tensors."""
    fakes = (node.meta["val"] for node in cut.site.nodes.values())
    mode = next((fake.fake_mode for fake in fakes if hasattr(fake, "fake_mode")), None)
    if mode is None:
        return {}
    domain = FakeDomain()
    with mode, enable_python_dispatcher():  # which operators of symbolic sizes go through
        values = rewrite(cut.rule, environment(cut, domain), domain.context(cut))
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
