"""Slots: rules whose numbers and sizes come from their parameters, so that one graph serves many.

A rewritten graph has a rule's settings in it: LoRA's `alpha / rank` is a constant there, and
`extend(mask, length)` adds so many tokens. A graph that takes an adapter's tensors as inputs must
not have them: the next adapter has another rank. :func:`slotted` says the same rule without,

    y + scale * linear(linear(x, A), B)     y + linear(scale_slot * linear(x, A), B)
    extend(mask, length)                    extend(mask, size(K, 0))
    y + linear(x, B @ A)                    choose(on_slot, y + linear(x, B @ A), y)

with one more parameter for each number that a tensor is added to or multiplied by, and with sizes
read off the parameters that have them. A number between two linears is multiplied by what is
smaller, and by nothing where the rank is 0. A rule that makes weights (`B @ A`) would make them for
a rank of 0 too: it has a switch, which is off at 0. Every other setting stays as it is.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from peftsurgery.errors import SurgeryError
from peftsurgery.language.evaluation import evaluate, written
from peftsurgery.language.expression import Expression, parse, spelling
from peftsurgery.language.readings import names_in
from peftsurgery.language.rule_file import RuleFile
from peftsurgery.language.schema import Param, Rule
from peftsurgery.language.settings import resolve_settings
from peftsurgery.reach import reach

SLOT = "slot"
SWITCH = "on_slot"
_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div)


@dataclass(frozen=True, eq=False)
class SlottedRule:
    """A rule with slots: the parameters that are slots for numbers, and axes of any size.

    The axes are those of the old rule's parameters, by name.
    """

    rule: Rule
    numbers: frozenset[str] = frozenset()
    free: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def slotted(file: RuleFile, settings: Mapping[str, Any]) -> tuple[SlottedRule, ...]:
    """Give a file's rules slots in the place of numbers and sizes, for these resolved settings.

    What a rule says of folding, penalties, ranks and other libraries is left out.
    """
    return tuple(_with_slots(file, rule, settings) for rule in file.rules)


def _with_slots(file: RuleFile, rule: Rule, settings: Mapping[str, Any]) -> SlottedRule:
    if not rule.params:
        return SlottedRule(rule)
    sizes = _sizes(file, rule, settings)
    while True:
        slots = _Saying(rule, settings, {n: size.axes[0] for size in sizes for n in size.names})
        changed = slots.rule()
        left = names_in([*changed.rewrite.values()], changed)
        kept = [size for size in sizes if not left & size.computed]
        if len(kept) == len(sizes):
            break
        sizes = kept  # something else than a slot is computed from it: its size is fixed
    axes = dict.fromkeys(place for size in sizes for place in size.axes)
    free = {name: tuple(a for other, a in axes if other == name) for name, _ in axes}
    return SlottedRule(changed, frozenset(changed.params.keys() - rule.params.keys()), free)


@dataclass(frozen=True)
class _FreeSize:
    """A size that parameters have: their axes, and names of numbers.

    ``names`` are equal to it, others are ``computed`` from what it is computed from.
    """

    axes: list[tuple[str, int]]
    names: set[str]
    computed: set[str]


def _sizes(file: RuleFile, rule: Rule, settings: Mapping[str, Any]) -> list[_FreeSize]:
    """The sizes of a rule's parameters that its settings decide, and nothing else of the file."""
    others = [each for each in file.rules if each is not rule and each.applies(settings)]
    # a `let` of another rule is that rule's own, whatever it is called
    elsewhere = {name for other in others for name in _all_names(other) - other.let.keys()}
    known = _numbers(rule, settings)
    numbers = {name: e for name, e in {**file.let, **rule.let}.items() if name in known}
    found = []
    for setting in file.with_:
        moved = {name for name, e in numbers.items() if setting in _reads(e, numbers)} | {setting}
        dims = [
            (name, axis, size)
            for name, param in rule.params.items()
            for axis, size in enumerate(param.shape)
            if moved & size.names.keys()
        ]
        if not dims or moved & elsewhere:
            continue
        same = _following(file, settings, setting, [size for *_, size in dims])
        texts = {size.text for *_, size in dims}
        if same is None and len(texts) == 1:
            same = texts & moved
        if same is not None:
            found.append(_FreeSize([(name, axis) for name, axis, _ in dims], same, moved - same))
    return found


def _numbers(rule: Rule, settings: Mapping[str, Any]) -> set[str]:
    """The names of a rule that stand for numbers, or for other settings."""
    names = {*settings, *rule.kind.sizes}
    for name, expression in rule.let.items():
        if names.issuperset(expression.names):
            names.add(name)
    return names


def _reads(expression: Expression, numbers: Mapping[str, Expression]) -> frozenset[str]:
    """The names that an expression reads, through other numbers too."""
    return frozenset(
        reach(expression.names, lambda name: numbers[name].names if name in numbers else ())
    )


def _all_names(rule: Rule) -> frozenset[str]:
    """Every name that a rule reads where it is applied."""
    shapes = (size for param in rule.params.values() for size in param.shape)
    return names_in([*rule.rewrite.values(), *shapes], rule)


def _following(
    file: RuleFile, settings: Mapping[str, Any], setting: str, sizes: Iterable[Expression]
) -> set[str] | None:
    """The names that have a setting's value whatever it is, if all these sizes have it, else None.

    With the other settings as they are: `length * copies` is `length` where there is one copy.
    """
    value = settings[setting]
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    own = {name: settings[name] for name in file.with_}
    wanted = [value, value + 1, value + 2]
    try:
        tried = [resolve_settings(file, {**own, setting: each}) for each in wanted]
        if any([evaluate(size, known) for known in tried] != wanted for size in sizes):
            return None
    except SurgeryError:  # it cannot be any number, or sites decide too
        return None
    return {name for name in settings if [known[name] for known in tried] == wanted}


@dataclass
class _Saying(ast.NodeTransformer):
    """One rule, said with slots; ``sizes`` are the axes to read names off."""

    old: Rule
    settings: Mapping[str, Any]
    sizes: Mapping[str, tuple[str, int]]
    slots: dict[str, str] = field(default_factory=dict)

    def rule(self) -> Rule:
        """The rule with slots."""
        self.numbers = _numbers(self.old, self.settings)
        tensors = {name: e for name, e in self.old.let.items() if name not in self.numbers}
        let = {**self.old.let, **{name: self.changed(e) for name, e in tensors.items()}}
        rewrite = {name: self.changed(e) for name, e in self.old.rewrite.items()}
        one = (parse(1),)  # onnxruntime's files take no tensors without axes
        if self._makes_weights():
            rewrite = {name: _switched(e, name) for name, e in rewrite.items()}
            self.slots["1"] = SWITCH
        slots = {name: Param(shape=one, init=parse(text)) for text, name in self.slots.items()}
        without: dict[str, Any] = {"fold": {}, "penalty": {}, "ranks": None, "checkpoint": {}}
        new = {"let": let, "rewrite": rewrite, "params": {**self.old.params, **slots}}
        return self.old.model_copy(update={**without, **new})

    def changed(self, expression: Expression) -> Expression:
        """An expression with slots."""
        return parse(written(self.visit(copy.deepcopy(expression.tree))))

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        """A number that meets a tensor is a slot."""
        parts = node.left, node.right
        if isinstance(node.op, _ARITHMETIC) and any(map(self._is_number, parts)):
            if all(map(self._is_number, parts)):
                return node
            node.left, node.right = (self._operand(part) for part in parts)
            return _between_linears(node)
        return ast.BinOp(self.visit(node.left), node.op, self.visit(node.right))

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        """A choice that settings decide is made."""
        found: ast.expr = node
        if all(name in self.settings for name in _names(node.test)):
            test = evaluate(parse(written(node.test)), self.settings)
            found = self.visit(node.body if test else node.orelse)
        return found

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        """All of a parameter's entries are the parameter: an index is no value of a graph."""
        end = node.slice.upper if isinstance(node.slice, ast.Slice) else None
        whole = (self.sizes.get(spelling(end)) if isinstance(end, ast.Name) else None) or ("", 0)
        plain = isinstance(node.slice, ast.Slice) and not node.slice.lower and not node.slice.step
        if plain and isinstance(node.value, ast.Name) and whole == (spelling(node.value), 0):
            return node.value
        return ast.Subscript(self.visit(node.value), self.visit(node.slice))

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """A size is read off the parameter that has it."""
        if spelling(node) not in self.sizes:
            return node
        name, axis = self.sizes[spelling(node)]
        return ast.parse(f"size({name}, {axis})", mode="eval").body

    def _makes_weights(self) -> bool:
        """Whether a product of matrices is among what the rewrite computes."""
        read = names_in(self.old.rewrite.values(), self.old)
        made = (e for name, e in self.old.let.items() if name in read)
        nodes = (n for e in (*self.old.rewrite.values(), *made) for n in ast.walk(e.tree))
        return any(isinstance(getattr(node, "op", None), ast.MatMult) for node in nodes)

    def _operand(self, node: ast.expr) -> ast.expr:
        if not self._is_number(node) or not self._reads_settings(node):
            found: ast.expr = self.visit(node)
            return found
        text = written(node)
        named = f"{text}_{SLOT}" if isinstance(node, ast.Name) else f"{SLOT}{len(self.slots)}"
        return ast.Name(self.slots.setdefault(text, named))

    def _is_number(self, node: ast.expr) -> bool:
        return self.numbers.issuperset(_names(node))

    def _reads_settings(self, node: ast.expr) -> bool:
        return not self.settings.keys().isdisjoint(names_in([parse(written(node))], self.old))


def _switched(new: Expression, old: str) -> Expression:
    """A new value where the rule's switch is on, and the old one where it is off."""
    return parse(f"choose({SWITCH}, {new}, {old})")


def _between_linears(node: ast.BinOp) -> ast.expr:
    """`n * linear(linear(x, A), B)` as `linear(n * linear(x, A), B)`; anything else as it is."""
    outer = node.right
    if not isinstance(node.op, ast.Mult) or not _is_linear(outer) or not _is_linear(outer.args[0]):
        return node
    outer.args[0] = ast.BinOp(node.left, node.op, outer.args[0])
    return outer


def _is_linear(node: ast.expr) -> TypeGuard[ast.Call]:
    """Whether this is a call of `linear` without a bias."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return False
    return node.func.id == "linear" and len(node.args) == 2


def _names(node: ast.expr) -> set[str]:
    """The names that a part of an expression reads, without the operators that it calls."""
    called = {id(part.func) for part in ast.walk(node) if isinstance(part, ast.Call)}
    words = (part for part in ast.walk(node) if isinstance(part, ast.Name))
    return {spelling(part) for part in words if id(part) not in called}
