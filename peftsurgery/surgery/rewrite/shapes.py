"""What a cut computes, over fake tensors: its shapes, before anything is sewn in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from peftsurgery.errors import SurgeryError
from peftsurgery.language import Context, rewrite, shape_of
from peftsurgery.language.consistency import OUTPUTS
from peftsurgery.surgery.plan.cut import Cut
from peftsurgery.surgery.rewrite.layout import as_seen, orient
from peftsurgery.surgery.rewrite.program import compute_dtype, is_float
from peftsurgery.surgery.rewrite.site_functions import Replay


def check_shapes(cut: Cut) -> None:
    """Evaluate a cut over fake tensors: PSG306 if the new value has another shape.

    PSG305 if the site has nothing of the name that is rewritten (a mask, a bias).
    """
    for name in cut.rule.rewrite:
        if name not in cut.site.nodes:
            raise SurgeryError(
                "PSG305",
                f"{cut.operation.name} rewrites '{name}', and {cut.placed.module} has none",
                "leave such sites out with `where:`",
            )
    for name, value in fake_rewrite(cut).items():
        if cut.rule.kind.lengthens:
            continue
        expected = as_seen(cut.site, name, _fake(cut, name))
        if tuple(value.shape) != tuple(expected.shape):
            raise SurgeryError(
                "PSG306",
                f"{cut.operation.name} at {cut.placed.module}: the new {name} has shape "
                f"{list(value.shape)}, where {list(expected.shape)} is needed",
            )


def fake_rewrite(cut: Cut, result: Any = None) -> dict[str, Any]:
    """The values a cut computes, as fake tensors; ``result`` is what its site gave so far."""
    fakes = [node.meta["val"] for node in cut.site.nodes.values()]
    mode = next((f.fake_mode for f in fakes if hasattr(f, "fake_mode")), None)
    if mode is None:
        return {}
    dtype = compute_dtype(cut)
    with mode, enable_python_dispatcher():  # which operators of symbolic sizes go through
        bound: dict[str, Any] = {**dict.fromkeys(cut.rule.kind.weights, 0.0), **cut.numbers}
        replay = Replay(cut.placed, _value, dtype)
        bound |= {name: replay.mask() for name in cut.rule.kind.optional}
        for name in sorted(cut.site.nodes.keys() & cut.rule.kind.names):
            node = cut.site.nodes[name]
            value = node.meta["val"]
            if name in cut.rule.kind.weights:
                value = orient(value, cut.site, name)
            elif name != cut.rule.kind.result:
                value = as_seen(cut.site, name, value)
            else:
                value = as_seen(cut.site, name, _fake(cut, name) if result is None else result)
            bound[name] = value.to(dtype) if is_float(node) else value
        for name, param in cut.rule.params.items():
            shape = shape_of(param, cut.rule, cut.numbers)
            bound[name] = torch.empty(shape, dtype=dtype, device=_device(fakes))
        if cut.over:
            bound[OUTPUTS] = torch.stack([fake_output(c).to(dtype) for c in cut.over], -2)
        context = Context(functions=replay.functions)
        return {
            name: value
            for name, value in rewrite(cut.rule, bound, context).items()
            if isinstance(value, torch.Tensor)
        }


def fake_output(cuts: Iterable[Cut]) -> Any:
    """What the cuts of one adapter make of their site's result, as a fake tensor."""
    value = None
    for cut in cuts:
        value = fake_rewrite(cut, value)[str(cut.rule.kind.result)]
    return value


def _fake(cut: Cut, name: str) -> Any:
    value = cut.site.nodes[name].meta["val"]
    if cut.site.slice is not None and name == cut.rule.kind.result:
        return cut.site.slice.take(value, -1)
    return value


def _value(node: fx.Node) -> Any:
    """The fake value of a node; a flag of the mode, or a rate that depends on it, is off."""
    value = node.meta.get("val")
    return 0 if value is None else value


def _device(fakes: Iterable[Any]) -> torch.device:
    return next(f.device for f in fakes if isinstance(f, torch.Tensor))
