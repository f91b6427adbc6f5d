"""describe_model: a captured or operated model as a description."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from peftsurgery.anatomy import Placed, survey
from peftsurgery.anatomy.values import fixed
from peftsurgery.capture import Capture, GraphModel, Program
from peftsurgery.capture.names import join
from peftsurgery.capture.stack import stack_paths
from peftsurgery.capture.tensors import tensor_names
from peftsurgery.diff.description import (
    Description,
    Insertion,
    Node,
    ShapeClass,
    SiteFacts,
    TensorFacts,
)
from peftsurgery.diff.source_line import source_line
from peftsurgery.language.describe import describe_sites, rule_facts
from peftsurgery.language.parameter_axes import sizes_said
from peftsurgery.language.schema import Rule
from peftsurgery.surgery.model.operated import OperatedModel
from peftsurgery.surgery.plan.cut import Cut, copy_name
from peftsurgery.surgery.plan.mode import Mode, mode_of

# What a config says of files and versions, and not of the model.
ASIDE = {"_name_or_path", "transformers_version", "_attn_implementation_internal"}


def describe_model(model: GraphModel) -> Description:
    """What a model is: as it is called now, with the adapters that are active."""
    capture = served(model)
    programs = {p.label: p for several in capture.programs.values() for p in several}
    return Description(
        kind=capture.top.kind,
        classes={label: _shape_class(program) for label, program in programs.items()},
        blocks={path: tuple(p.label for p in each) for path, each in capture.programs.items()},
        tensors=_tensors(model),
        sites={_site_name(each): _facts(each) for each in survey(model.base_capture)},
        insertions=insertions(_active_cuts(model)),
        config=_config(getattr(model, "config", None)),
    )


def served(model: GraphModel) -> Capture:
    """The capture that the model was made with, as the model runs it now."""
    ready = model.captures
    return ready[0] if ready else model.base_capture


def _shape_class(program: Program) -> ShapeClass:
    inputs = list(program.graph.find_nodes(op="placeholder"))
    named = {node: f"{number}" if program.home else node.name for number, node in enumerate(inputs)}
    nodes = {n.name: _node(n, program, named.get(n, "")) for n in program.graph.nodes}
    types = {path: each.type for path, each in program.modules.items() if path}
    return ShapeClass(program.kind, nodes, types)


def _node(node: fx.Node, program: Program, given: str) -> Node:
    operands: dict[fx.Node, int] = {}

    def numbered(operand: fx.Node) -> Any:
        return _Shown(f"%{operands.setdefault(operand, len(operands))}")

    args, kwargs = fx.map_arg((node.args, node.kwargs), numbered)
    kinds = {"placeholder": "input", "get_attr": "read", "call_module": "call", "output": "output"}
    kind = kinds.get(node.op) or _operator(node)
    if kind in ("read", "call"):
        form, module = (_form(args, {}) if kind == "call" else ""), str(node.target)
    else:
        shown = {name: value for name, value in kwargs.items() if value is not None}
        form = given or _form(args, shown)
        module = _module(node, program)
    surgery = str(node.meta.get("surgery") or "")
    names = tuple(n.name for n in operands)
    return Node(kind, module, names, form, shape_of_value(node), surgery, source_line(node))


def _form(args: Iterable[Any], kwargs: Mapping[str, Any]) -> str:
    """Arguments as a call is written with them."""
    named = (f"{name}={value!r}" for name, value in kwargs.items())
    return f"({', '.join([*map(repr, args), *named])})"


def _operator(node: fx.Node) -> str:
    """What a node calls, without namespace and overload; in place or not is a difference."""
    target: Any = node.target
    packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
    return str(getattr(packet, "__name__", packet))


class _Shown(str):
    """A text that shows itself without quotes."""

    def __repr__(self) -> str:
        return str(self)


def _module(node: fx.Node, program: Program) -> str:
    """The path of the innermost module that made a node, relative to the program's block."""
    paths = [path for _, path in stack_paths(node)]
    if not paths:
        return ""
    home, last = program.home, paths[-1]
    if not home:
        return last
    return last.removeprefix(f"{home}.") if last.startswith(f"{home}.") else ""


def shape_of_value(node: fx.Node) -> str:
    """The dtype and sizes of a node's value; a size that varies is a star."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ""
    sizes = ("*" if (size := fixed(each)) is None else str(size) for each in value.shape)
    return f"{dtype_name(value.dtype)}[{', '.join(sizes)}]"


def dtype_name(dtype: torch.dtype) -> str:
    """float32, bfloat16 and so on."""
    return str(dtype).removeprefix("torch.")


def _tensors(model: GraphModel) -> dict[str, TensorFacts]:
    """The facts of every tensor but those of adapters that take no part in a call."""
    found = _all_tensors(model)
    if not isinstance(model, OperatedModel):
        return found
    parts: tuple[set[str], set[str]] = (set(), set())
    mode = _mode(model)
    for cut in model.cuts:
        parts[mode.takes_part(cut)].update(_added(cut))
    resting, active = parts
    return {name: each for name, each in found.items() if name in active or name not in resting}


def _added(cut: Cut) -> list[str]:
    """The names of what a cut adds: of its parameters, and of its copy of what it trains."""
    own = cut.placed.parameter if cut.rule.train else None
    copied = [] if own is None else [copy_name(own, cut.operation.name)]
    return [*cut.parameters.values(), *copied]


def _all_tensors(model: GraphModel) -> dict[str, TensorFacts]:
    names = tensor_names(model)
    found = {}
    for path, part in model.named_modules(remove_duplicate=False):
        for leaf, parameter in part.named_parameters(recurse=False):
            name = join(path, leaf)
            found[name] = _tensor(parameter, "parameter", names[name][0])
        for leaf, buffer in part.named_buffers(recurse=False):
            name = join(path, leaf)
            if leaf not in part._non_persistent_buffers_set:
                found[name] = _tensor(buffer, "buffer", names[name][0])
    return found


def _tensor(tensor: torch.Tensor, kind: str, tied: str) -> TensorFacts:
    return TensorFacts(
        dtype_name(tensor.dtype), tuple(tensor.shape), kind, tensor.requires_grad, tied
    )


def _site_name(placed: Placed) -> str:
    part = f"[{placed.site.label}]" if placed.site.label else ""
    after = f" after {placed.facts['after']}" if placed.kind == "residual" else ""
    name = placed.parameter if placed.kind == "parameter" else placed.module
    return f"{name} {placed.kind}{part}{after}"


def _facts(placed: Placed) -> SiteFacts:
    facts = {
        name: str(value)
        for name, value in placed.facts.items()
        if isinstance(value, str | int | float | bool) and name != "role"
    }
    bindings = {name: node.name for name, node in placed.site.nodes.items()}
    return SiteFacts(
        placed.kind, placed.role or "", tuple(sorted(facts.items())), tuple(bindings.items())
    )


def _active_cuts(model: GraphModel) -> list[Cut]:
    if not isinstance(model, OperatedModel):
        return []
    mode = _mode(model)
    return [cut for cut in model.cuts if mode.takes_part(cut)]


def _mode(model: OperatedModel) -> Mode:
    """Which adapters take part now, and in which layers they do not."""
    left_out = {name: tuple(layers) for name, layers in model.left_out.items()}
    return mode_of(model.adapters, model.active, left_out)


def insertions(cuts: Iterable[Cut]) -> dict[str, Insertion]:
    """What cuts put where, by site and adapter."""
    seen: Counter[str] = Counter()
    said: dict[tuple[int, int], tuple[str, ...]] = {}
    found = {}
    for cut in cuts:
        rule, settings = cut.rule, cut.operation.settings
        of = id(rule), id(settings)
        said[of] = said.get(of) or _said(rule, settings)
        key = f"{_site_name(cut.placed)} {cut.operation.name}"
        seen[key] += 1  # several rules of one adapter may meet at one site
        found[f"{key} {seen[key]}" if seen[key] > 1 else key] = _insertion(cut, said[of])
    return found


def _said(rule: Rule, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """What a rule matches, then what it does there, in words and maths."""
    facts = (f"{name} {text}" for name, text in rule_facts(rule, settings))
    return (describe_sites(rule), *facts)


def _insertion(cut: Cut, said: tuple[str, ...]) -> Insertion:
    read = sizes_said(cut.rule, cut.operation.settings)
    numbers: Mapping[str, Any] = cut.numbers
    own = cut.placed.parameter if cut.rule.train else None
    return Insertion(
        cut.operation.name,
        cut.placed.module,
        cut.placed.role or cut.placed.kind,
        tuple((name, str(numbers[name])) for name in sorted(read)),
        (*([] if own is None else [own]), *_added(cut)),
        said,
    )


def _config(config: Any) -> dict[str, Any]:
    to_dict = getattr(config, "to_dict", None)
    return {} if to_dict is None else dict(_flat(to_dict(), ""))


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """The settings of a config and those in it, by dotted names."""
    for name, value in values.items():
        if isinstance(value, dict) and value and all(isinstance(key, str) for key in value):
            yield from _flat(value, f"{prefix}{name}.")
        elif name not in ASIDE:
            yield f"{prefix}{name}", value if isinstance(value, int | float | bool) else str(value)
