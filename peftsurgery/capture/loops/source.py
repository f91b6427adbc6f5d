"""What the source of a loop says of it: whether one turn is like another as far as Python tells.

    outputs = []
    for i in range(x.shape[1]):
        state = decay[:, i] * state + x[:, i]
        outputs.append(state)
    return torch.stack(outputs, dim=1)

Three turns of such a loop stand for any number of them, if nothing but tensors goes from one turn
to the next and out of the loop. What goes there by a name, the source shows: a name that is read
behind the loop, a list that is filled turn by turn and then stacked. Where there is no source, or
more in it than this, a loop is not kept.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType
from typing import Any

JOINS = ("stack", "cat", "concat")
"""Functions of torch that make one tensor of a list of them."""
_AWAY = (
    *(ast.Break, ast.Return, ast.Yield, ast.YieldFrom, ast.Await, ast.Global, ast.Nonlocal),
    *(ast.Delete, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.Try),
    *(ast.NamedExpr, ast.While, ast.Raise, ast.With, ast.Import, ast.ImportFrom),
)


@dataclass(frozen=True)
class LoopSource:
    """A ``for`` over a range: the names that it assigns, and what becomes of them.

    ``index`` is what it counts in, ``assigned`` are all names that it gives values; of these,
    ``fresh`` get a new one in every turn before it is read, and ``read_behind`` are read when the
    loop is over. ``joined`` are names of lists that are only appended to, and then joined.
    """

    index: str
    assigned: frozenset[str]
    fresh: frozenset[str]
    read_behind: frozenset[str]
    joined: frozenset[str]


@lru_cache(maxsize=256)
def loop_source(code: CodeType, line: int) -> LoopSource | None:
    """The loop over a range that begins on this line of a file; None for any that may do more."""
    function = _function(code)
    if function is None:
        return None
    found = [
        node
        for node in ast.walk(function)
        if isinstance(node, ast.For) and node.iter.lineno <= line <= _end(node.iter)
    ]
    if len(found) != 1 or not _is_plain(found[0]):
        return None
    return _read(function, found[0])


def _function(code: CodeType) -> ast.AST | None:
    """The tree of a function, with the lines of its file; None without source."""
    try:
        lines, first = inspect.getsourcelines(code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return None
    ast.increment_lineno(tree, max(first, 1) - 1)
    is_function = len(tree.body) == 1 and isinstance(tree.body[0], ast.FunctionDef)
    return tree.body[0] if is_function else None


def _is_plain(loop: ast.For) -> bool:
    """Whether a loop counts from nought in a name of its own, and is left at its end alone."""
    match loop:
        case ast.For(
            target=ast.Name(),
            iter=ast.Call(
                func=ast.Name(id="range"), args=[_] | [ast.Constant(value=0), _], keywords=[]
            ),
            orelse=[],
        ):
            return not any(isinstance(node, _AWAY) for each in loop.body for node in ast.walk(each))
    return False


def _read(function: ast.AST, loop: ast.For) -> LoopSource | None:
    """What is assigned in a loop, and what of that is read behind it."""
    assert isinstance(loop.target, ast.Name)
    inside = [node for each in loop.body for node in ast.walk(each)]
    if any(_is_kept(node) for node in inside):
        return None
    index, assigned = loop.target.id, frozenset(_names(inside, ast.Store))
    outside = list(_outside(function, loop))
    around = _is_within_loop(function, loop)
    behind = [n for n in outside if around or n.lineno > _end(loop)]
    if index in assigned or _reads_own(function, loop, index):
        return None
    made, joined = _made_and_joined(function)
    given = {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
    lists = {
        name
        for name in _names(inside, ast.Load)
        if name not in given
        and any(id(n) in made for n in outside if n.id == name)
        and _is_appended_to(inside, name)
        and all(
            id(n) in (made if isinstance(n.ctx, ast.Store) else joined)
            for n in outside
            if n.id == name
        )
    }
    return LoopSource(
        index,
        assigned,
        frozenset(_fresh(loop.body)),
        frozenset(node.id for node in behind if isinstance(node.ctx, ast.Load)) & assigned,
        frozenset(lists),
    )


def _is_kept(node: ast.AST) -> bool:
    """Whether a node gives a value to an attribute, which outlives the turn unseen."""
    return isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)


def _names(nodes: list[ast.AST], context: type[ast.expr_context]) -> Iterator[str]:
    return (n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, context))


def _outside(function: ast.AST, loop: ast.For) -> Iterator[ast.Name]:
    """The names in a function that are not in a loop."""
    inside = {id(node) for node in ast.walk(loop)}
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and id(node) not in inside:
            yield node


def _is_within_loop(function: ast.AST, loop: ast.For) -> bool:
    """Whether a loop is in another: then what is before it comes behind it too."""
    outer = (n for n in ast.walk(function) if isinstance(n, ast.For | ast.While) and n is not loop)
    return any(node is loop for each in outer for node in ast.walk(each))


def _reads_own(function: ast.AST, loop: ast.For, index: str) -> bool:
    """Whether what a loop counts in is read outside of it, but for loops that count in it too."""
    own = {id(node) for node in ast.walk(loop)}
    for node in ast.walk(function):
        if isinstance(node, ast.For | ast.comprehension) and _counts_in(node, index):
            own |= {id(each) for each in ast.walk(node)}
        generators: list[Any] = getattr(node, "generators", [])
        if any(_counts_in(each, index) for each in generators):
            own |= {id(each) for each in ast.walk(node)}
    return any(
        isinstance(node, ast.Name)
        and node.id == index
        and isinstance(node.ctx, ast.Load)
        and id(node) not in own
        for node in ast.walk(function)
    )


def _counts_in(node: Any, index: str) -> bool:
    return isinstance(node.target, ast.Name) and node.target.id == index


def _fresh(body: list[ast.stmt]) -> Iterator[str]:
    """The names that a statement of the body itself assigns before anything in it reads them."""
    read: set[str] = set()
    for statement in body:
        read |= set(_names(list(ast.walk(statement)), ast.Load))
        if isinstance(statement, ast.Assign):
            stored = [node for target in statement.targets for node in ast.walk(target)]
            yield from (name for name in _names(stored, ast.Store) if name not in read)


def _made_and_joined(function: ast.AST) -> tuple[set[int], set[int]]:
    """The names that become an empty list, and those of lists that torch joins, by identity.

    Whatever else reads a list would see how many turns there were.
    """
    made, joined = set[int](), set[int]()
    for node in ast.walk(function):
        match node:
            case ast.Assign(targets=[ast.Name() as target], value=ast.List(elts=[])):
                made.add(id(target))
            case ast.Assign(targets=[ast.Tuple() as target], value=ast.Tuple(elts=values)):
                pairs = zip(target.elts, values, strict=False)
                made |= {id(t) for t, v in pairs if isinstance(v, ast.List) and not v.elts}
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="torch"), attr=name),
                args=[ast.Name() as one, *_],
            ) if name in JOINS:
                joined.add(id(one))
    return made, joined


def _is_appended_to(inside: list[ast.AST], name: str) -> bool:
    """Whether all that a loop does with a name is to call its ``append``."""
    parents = {id(child): node for node in inside for child in ast.iter_child_nodes(node)}
    found = [node for node in inside if isinstance(node, ast.Name) and node.id == name]
    methods = [parents.get(id(node)) for node in found]
    return all(isinstance(each, ast.Attribute) and each.attr == "append" for each in methods)


def _end(node: Any) -> int:
    return int(node.end_lineno or node.lineno)
