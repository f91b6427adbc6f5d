"""Expressions: the small closed language in which a rule states its algebra.

An expression is parsed with Python's ``ast`` and kept as a tree of a dozen node types: numbers,
names, arithmetic, comparisons, ``a if n > 0 else b``, tuples, slices, and calls of operators by
bare name. Everything else is refused here, so no reading of an expression can ever reach an
attribute, an import or a name outside its bindings. Size is bounded: a rule is a line, not a
program.
"""

from __future__ import annotations

import ast
import keyword
import operator as python
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.language.position import Position, Text

MAX_CHARACTERS, MAX_NODES, MAX_DEPTH, MAX_EXPONENT, MAX_NUMBER = 2000, 200, 50, 64, 2**63

# Strings, braces, backslashes, ';' and the like never reach the parser.
_FOREIGN = re.compile(r"[^A-Za-z0-9_+\-*/@%().,\[\]:<>=! \t\n]")

# `in` is a size of every linear, but a keyword of Python: it is parsed under a name of equal length
# that no (ASCII) expression can spell.
_IN, _IN_ALIAS = re.compile(r"\bin\b"), "\u0456n"

_KEYWORDS = set(keyword.kwlist) - {"in", "if", "else", "True", "False", "None"}
_KEYWORD = re.compile(rf"\b({'|'.join(sorted(_KEYWORDS))})\b")

_WORDS = {
    ast.Attribute: "attribute access",
    ast.Starred: "a starred argument",
    ast.NamedExpr: "an assignment",
}
_NODES = (
    ast.Name,
    ast.Constant,
    ast.BinOp,
    ast.UnaryOp,
    ast.Call,
    ast.keyword,
    ast.Tuple,
    ast.List,
    ast.Subscript,
    ast.Slice,
    ast.Compare,
    ast.IfExp,
)

ARITHMETIC: Mapping[type[ast.AST], Callable[..., Any]] = {
    ast.Add: python.add,
    ast.Sub: python.sub,
    ast.Mult: python.mul,
    ast.Div: python.truediv,
    ast.FloorDiv: python.floordiv,
    ast.Mod: python.mod,
    ast.MatMult: python.matmul,
    ast.Pow: python.pow,
    ast.USub: python.neg,
    ast.UAdd: python.pos,
    ast.Lt: python.lt,
    ast.LtE: python.le,
    ast.Gt: python.gt,
    ast.GtE: python.ge,
    ast.Eq: python.eq,
    ast.NotEq: python.ne,
}
"""The signs of the language, and what each does."""


@dataclass(frozen=True)
class Expression:
    """A parsed expression: its text, the names it reads and the operators it calls.

    ``names`` and ``calls`` map each word to the offset of its first use in the text.
    """

    text: str
    names: Mapping[str, int] = field(compare=False, repr=False)
    calls: Mapping[str, int] = field(compare=False, repr=False)
    tree: ast.expr = field(compare=False, repr=False)
    written: Text | None = field(default=None, compare=False, repr=False)

    def where(self, offset: int = 0) -> str | None:
        """``file:line:column`` of a character of the text, if the expression came from a file."""
        return str(self.written.at(offset)) if self.written is not None else None

    def __str__(self) -> str:
        return self.text


def parse(text: str | int | float, where: str | None = None) -> Expression:
    """Parse ``text``, or refuse it with PSG110 (syntax), PSG111 (construct) or PSG112 (size).

    ``where`` names the source when ``text`` is not a :class:`Text` that knows its own position.
    """
    if isinstance(text, bool) or not isinstance(text, str | int | float):
        raise SurgeryError("PSG110", f"an expression is a text, not {text!r}", where=where)
    made = Text(str(text), Position(where)) if where else None
    written = text if isinstance(text, Text) else made
    try:
        return replace(_parsed(str(text)), written=written)
    except SurgeryError:  # once more, to say where
        return _Parser(str(text), written).expression()


@lru_cache(maxsize=2048)  # rules that stand on one base have most of their expressions from it
def _parsed(text: str) -> Expression:
    return _Parser(text, None).expression()


def check_names(expression: Expression, known: Collection[str]) -> None:
    """Refuse an expression that reads a name outside ``known`` (PSG113)."""
    _check_words(expression, expression.names, known, "PSG113", "name")


def check_calls(expression: Expression, known: Collection[str]) -> None:
    """Refuse an expression that calls an operator outside ``known`` (PSG114)."""
    _check_words(expression, expression.calls, known, "PSG114", "operator")


def _check_words(
    expression: Expression, words: Mapping[str, int], known: Collection[str], code: str, what: str
) -> None:
    for name, offset in words.items():
        if name not in known:
            message = f"unknown {what} '{name}' in '{expression.text}'"
            where = expression.where(offset)
            raise SurgeryError(code, message, did_you_mean(name, known), where)


def within(let: Mapping[str, Expression], names: Iterable[str]) -> set[str]:
    """``names`` and the let names that can be computed from them alone."""
    known = set(names)
    for name, expression in let.items():
        if known.issuperset(expression.names):
            known.add(name)
    return known


def spelling(node: ast.Name) -> str:
    """The name that was written: undoes the stand-in for the keyword ``in``."""
    return "in" if node.id == _IN_ALIAS else node.id


class _Parser:
    """One parse: text in, checked tree out; every refusal knows its offset."""

    def __init__(self, text: str, written: Text | None) -> None:
        self.text, self.written = text, written
        self.names: dict[str, int] = {}
        self.calls: dict[str, int] = {}
        self.nodes = 0

    def expression(self) -> Expression:
        if len(self.text) > MAX_CHARACTERS:
            raise self.refuse("PSG112", f"an expression of {len(self.text)} characters", 0)
        foreign = _FOREIGN.search(self.text) or _KEYWORD.search(self.text)
        if foreign:
            message = f"'{foreign.group()}' is not part of the language"
            raise self.refuse("PSG111", message, foreign.start())
        tree = self.python()
        self.check(tree, 1, False)
        return Expression(self.text, self.names, self.calls, tree, self.written)

    def python(self) -> ast.expr:
        line = _IN.sub(_IN_ALIAS, self.text.replace("\n", " ").replace("\t", " "))
        self.lead = len(line) - len(line.lstrip())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # '1if x else 2' and the like warn; we decide
                return ast.parse(line.lstrip(), mode="eval").body
        except SyntaxError as error:
            column = max(0, (error.offset or 1) - 1) + self.lead
            raise self.refuse("PSG110", f"{error.msg} in '{self.text}'", column) from None
        except (ValueError, RecursionError, MemoryError):
            raise self.refuse("PSG112", "an expression nested too deeply", 0) from None

    def check(self, node: ast.AST, depth: int, in_power: bool) -> None:
        self.nodes += 1
        offset = self.offset(node)
        if self.nodes > MAX_NODES or depth > MAX_DEPTH:
            raise self.refuse("PSG112", f"'{self.text[:60]}...' is too large", offset)
        if not isinstance(node, _NODES):
            what = _WORDS.get(type(node), type(node).__name__.lower())
            raise self.refuse("PSG111", f"{what} is not part of the language", offset)
        if isinstance(node, ast.Name):
            self.word(spelling(node), self.names, offset)
        elif isinstance(node, ast.Constant):
            self.constant(node.value, offset)
        power = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow)
        if power and in_power:
            raise self.refuse("PSG112", f"nested powers in '{self.text}'", offset)
        for child in self.children(node, offset):
            self.check(child, depth + 1, in_power or power)

    def children(self, node: ast.AST, offset: int) -> list[ast.AST]:
        """The nodes to check below this one, after what is special about its own type."""
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Name):
                raise self.refuse("PSG111", "only operators are called, by bare name", offset)
            self.word(spelling(node.func), self.calls, offset)
            return [*node.args, *node.keywords]
        if isinstance(node, ast.keyword) and node.arg is None:
            raise self.refuse("PSG111", "a starred argument is not part of the language", offset)
        if isinstance(node, ast.Compare) and len(node.ops) > 1:
            raise self.refuse("PSG111", "a chain of comparisons is not in the language", offset)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
            self.exponent(node.right, offset)
        inner = list(ast.iter_child_nodes(node))
        operators = [c for c in inner if isinstance(c, ast.operator | ast.unaryop | ast.cmpop)]
        for symbol in operators:
            if type(symbol) not in ARITHMETIC:
                word = type(symbol).__name__.lower()
                raise self.refuse("PSG111", f"'{word}' is not part of the language", offset)
        return [c for c in inner if c not in operators and not isinstance(c, ast.expr_context)]

    def word(self, name: str, seen: dict[str, int], offset: int) -> None:
        if name.startswith("__"):
            raise self.refuse("PSG111", f"'{name}' begins with '__'", offset)
        seen.setdefault(name, offset)

    def constant(self, value: object, offset: int) -> None:
        if value is None or value is Ellipsis or isinstance(value, bool):
            return
        if not isinstance(value, int | float):
            raise self.refuse("PSG111", f"{value!r} is not part of the language", offset)
        if not abs(value) < MAX_NUMBER:  # infinity too
            raise self.refuse("PSG112", "a number of 2^63 or more", offset)

    def exponent(self, node: ast.AST, offset: int) -> None:
        while isinstance(node, ast.UnaryOp):
            node = node.operand
        value = node.value if isinstance(node, ast.Constant) else 0
        if isinstance(value, int | float) and abs(value) > MAX_EXPONENT:
            raise self.refuse("PSG112", f"an exponent of {value}", offset)

    def offset(self, node: ast.AST) -> int:
        # ast counts UTF-8 bytes, and the stand-in for `in` has one byte more than characters
        column = getattr(node, "col_offset", 0)
        line = _IN.sub(_IN_ALIAS, self.text).lstrip().encode()
        return self.lead + len(line[:column].decode(errors="ignore"))

    def refuse(self, code: str, message: str, offset: int) -> SurgeryError:
        position = str(self.written.at(offset)) if self.written is not None else None
        hint = None
        if code == "PSG112":
            hint = f"limits: {MAX_CHARACTERS} characters, {MAX_NODES} nodes, {MAX_DEPTH} levels"
        elif code == "PSG110" and self.text.count("(") > self.text.count(")"):
            hint = "inside { } or [ ] of YAML, quote an expression that holds a comma"
        return SurgeryError(code, message, hint, position)
