"""Small faults that can be put into a source file: what `mutations.py` samples from.

A mutant replaces one piece of the text by another and leaves the rest as it is, so that a survivor
can be read as a line before and after. Keywords, calls and statements are dropped, too, and an
operator becomes one that gives a value of the same kind: a fault that raises at once says little
about tests.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
from collections.abc import Iterator

KINDS = ("comparison", "arithmetic", "logic", "condition", "constant", "keyword", "call", "removal")

_COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
# Without these a program does not get far: their absence is no fault that a test has to find.
_NEEDED_CALLS = {
    *("len", "range", "zip", "enumerate", "isinstance", "issubclass", "type", "getattr", "hasattr"),
    *("partial", "replace", "TypeVar", "cast", "super", "iter", "next", "open", "map", "filter"),
}
# Methods of which the receiver can stand for the result.
_METHODS = {"astype", "reshape", "transpose", "copy", "strip", "lower", "sum", "max", "min", "mean"}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A piece of a source file and the text that replaces it.

    Args:
      kind: One of `KINDS`.
      start: Where the piece begins, in bytes of UTF-8.
      end: Where it ends.
      line: The number of its first line.
      before: The piece.
      after: What takes its place.
    """

    kind: str
    start: int
    end: int
    line: int
    before: str
    after: str

    def apply(self, source: str) -> str:
        """The text with the fault in it."""
        data = source.encode()
        return (data[: self.start] + self.after.encode() + data[self.end :]).decode()


def find(source: str) -> list[Mutant]:
    """Every mutant of a Python file, in the order of its text."""
    lines = source.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))

    found = []
    for kind, node, after in _faults(ast.parse(source)):
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        before = source.encode()[start:end].decode()
        found.append(Mutant(kind, start, end, node.lineno, before, after))
    return sorted(set(found), key=lambda mutant: (mutant.start, mutant.end, mutant.after))


def _faults(tree: ast.Module) -> Iterator[tuple[str, ast.expr | ast.stmt, str]]:
    """The kind of each fault, the node that it replaces, and by what."""
    for node, statement in _nodes(tree):
        if isinstance(node, ast.expr):
            for kind, new in _of_expression(node, statement):
                yield kind, node, ast.unparse(ast.fix_missing_locations(new))
        if isinstance(node, (ast.If, ast.While, ast.IfExp)):
            yield "condition", node.test, f"not ({ast.unparse(node.test)})"
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for removed in _removable(node):
                yield "removal", removed, "pass"


def _nodes(tree: ast.Module) -> Iterator[tuple[ast.AST, bool]]:
    """Every node that does something when the program runs, and whether it is a whole statement:
    no annotations, decorators, messages of errors, or what is there for type checkers alone.
    """
    waiting: list[tuple[ast.AST, bool]] = [(tree, False)]
    while waiting:
        node, statement = waiting.pop()
        if isinstance(node, (ast.JoinedStr, ast.Raise, ast.Import, ast.ImportFrom)):
            continue  # within the first, Python 3.11 does not know where nodes are
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node, statement
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "bases", "type_params"):
                continue
            children = value if isinstance(value, list) else [value]
            whole = isinstance(node, ast.Expr)
            waiting.extend((child, whole) for child in children if isinstance(child, ast.AST))


def _of_expression(node: ast.expr, statement: bool) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        new = copy.deepcopy(node)
        new.ops = [_COMPARISONS[type(node.ops[0])]()]
        yield "comparison", new
    elif isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        new = copy.deepcopy(node)
        new.op = _ARITHMETIC[type(node.op)]()
        yield "arithmetic", new
    elif isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "logic", _whole(ast.BoolOp(other, node.values))
    elif isinstance(node, ast.Constant):
        yield from _of_constant(node)
    elif isinstance(node, ast.Call):
        yield from _of_call(node, statement)


def _of_constant(node: ast.Constant) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node.value, bool):
        yield "constant", ast.Constant(not node.value)
    elif isinstance(node.value, int):
        yield "constant", ast.Constant(node.value + 1)
    elif isinstance(node.value, float):
        yield "constant", ast.Constant(1.5 * node.value if node.value else 1.0)


def _of_call(node: ast.Call, statement: bool) -> Iterator[tuple[str, ast.expr]]:
    """Yield the call without each of its keywords, and its first argument alone."""
    for index, keyword in enumerate(node.keywords):
        if keyword.arg is None:
            continue
        new = copy.deepcopy(node)
        del new.keywords[index]
        yield "keyword", new
    name = ast.unparse(node.func).rpartition(".")[2]
    if statement or name in _NEEDED_CALLS or name[:1].isupper():
        return
    if isinstance(node.func, ast.Attribute) and name in _METHODS:
        yield "call", _whole(node.func.value)
    elif node.args and not isinstance(node.args[0], ast.Starred):
        yield "call", _whole(node.args[0])


def _whole(node: ast.expr) -> ast.expr:
    """Wrap an expression so that it can stand in any place: as the only entry of a tuple."""
    if isinstance(node, (ast.Name, ast.Attribute, ast.Call, ast.Subscript)):
        return node
    return ast.Subscript(ast.Tuple([node]), ast.Constant(0))


def _removable(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[ast.stmt]:
    """Statements without which every name of a function is still there: calls, errors, and new
    values of names that have one.
    """
    arguments = function.args
    bound = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    for node in _statements(function.body):
        if isinstance(node, ast.Assign):
            names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and _stored(n)}
            if names and names <= bound:
                yield node
            bound |= names
        elif isinstance(node, (ast.AugAssign, ast.Raise)):
            yield node
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield node


def _stored(name: ast.Name) -> bool:
    return isinstance(name.ctx, ast.Store)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a block and of the blocks in it, but of functions and classes in it."""
    for node in body:
        yield node
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        for name in ("body", "orelse", "finalbody"):
            yield from _statements(getattr(node, name, []))
        for handler in getattr(node, "handlers", []):
            yield from _statements(handler.body)
