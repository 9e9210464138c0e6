"""Which pointers a Triton kernel loads from and which it stores to, read from its source for the constants it is given.

A name that is computed from a pointer points where that points. Branches on constants are taken as they would be, all
others both ways. What a kernel does to a pointer through other `@triton.jit` functions counts too.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

Names = set[str]


def accesses(kernel: Any, arguments: dict[str, Any]) -> tuple[Names, Names]:
    """The parameters that point to what is loaded, and to what is stored."""
    constants = {name: arguments[name] for name in _constants(kernel.fn)}
    return _accesses(kernel, tuple(constants.items()))


@lru_cache
def _accesses(kernel: Any, constants: tuple[tuple[str, Any], ...]) -> tuple[Names, Names]:
    given = dict(constants)
    walk = _Walk(kernel, given, {name: {name} for name in kernel.arg_names if name not in given})
    walk.run()
    return walk.loaded, walk.stored


@lru_cache
def _constants(function: Any) -> tuple[str, ...]:
    """The parameters that are `tl.constexpr`."""
    arguments = _definition(function).args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return tuple(arg.arg for arg in every if arg.annotation is not None and "constexpr" in ast.unparse(arg.annotation))


@lru_cache
def _definition(function: Any) -> ast.FunctionDef:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(definition, ast.FunctionDef)
    return definition


class _Walk:
    def __init__(self, kernel: Any, constants: dict[str, Any], points_to: dict[str, Names]):
        self.definition, self.globals = _definition(kernel.fn), kernel.fn.__globals__
        self.constants, self.points_to = constants, points_to
        self.loaded: Names = set()
        self.stored: Names = set()
        self.returned: Names = set()
        self.surely = True  # whether the statement at hand is run at all

    def run(self) -> None:
        self._body(self.definition.body)

    def _body(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            if isinstance(statement, ast.If):
                self._calls(statement.test)
                known, surely = self._value(statement.test), self.surely
                self.surely = surely and known is not None
                if known is not False:
                    self._body(statement.body)
                if known is not True:
                    self._body(statement.orelse)
                self.surely = surely
            elif isinstance(statement, ast.For | ast.While):
                self._calls(statement.iter if isinstance(statement, ast.For) else statement.test)
                for _ in range(2):  # what its end assigns is there at its beginning, and it may run no time
                    before = dict(self.points_to)
                    self._body(statement.body)
                    self.points_to |= {name: self.points_to[name] | pointers for name, pointers in before.items()}
            else:
                self._simple(statement)

    def _simple(self, statement: ast.stmt) -> None:
        self._calls(statement)
        if isinstance(statement, ast.Return) and statement.value is not None:
            self.returned |= self._pointers(statement.value)
        if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign) and statement.value is not None:
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            pointers = self._pointers(statement.value)
            for name in (part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)):
                stays = isinstance(statement, ast.AugAssign) or not self.surely
                self.points_to[name] = pointers | self.points_to.get(name, set()) if stays else pointers
                self.constants.pop(name, None)

    def _calls(self, tree: ast.AST) -> None:
        for call in ast.walk(tree):
            if isinstance(call, ast.Call):
                self._call(call)

    def _call(self, call: ast.Call) -> Names:
        """Note what a call loads and stores; what its result points to."""
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        # a descriptor's own methods, or triton.language's functions of a pointer
        is_method = isinstance(call.func, ast.Attribute) and bool(self._pointers(call.func.value))
        place = call.func.value if is_method else call.args[0] if call.args else None  # type: ignore[attr-defined]
        if name in ("load", "gather", "store", "scatter") or name.startswith("atomic_"):
            pointers = self._pointers(place) if place is not None else set()
            if name in ("load", "gather") or name.startswith("atomic_"):
                self.loaded |= pointers
            if name not in ("load", "gather"):
                self.stored |= pointers
            return set()
        function = self._function(call.func)
        if function is None:
            return {pointer for part in _parts(call) for pointer in self._pointers(part)}
        given = dict(zip(function.arg_names, call.args, strict=False))
        given |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg is not None}
        constants = {key: self._evaluated(part) for key, part in given.items() if key in _constants(function.fn)}
        constants = {key: value for key, value in constants.items() if value is not _UNKNOWN}
        walk = _Walk(function, constants, {key: self._pointers(part) for key, part in given.items()})
        walk.run()
        self.loaded |= walk.loaded
        self.stored |= walk.stored
        return walk.returned

    def _pointers(self, tree: ast.AST) -> Names:
        """The parameters that a value may point into."""
        if isinstance(tree, ast.Name):
            return self.points_to.get(tree.id, set())
        if isinstance(tree, ast.Call):
            return self._call(tree)
        if isinstance(tree, ast.Compare | ast.Attribute):
            return set()
        return {pointer for part in ast.iter_child_nodes(tree) for pointer in self._pointers(part)}

    def _function(self, tree: ast.expr) -> Any:
        if isinstance(tree, ast.Name | ast.Attribute):
            found = self._evaluated(tree)
            return found if hasattr(found, "arg_names") and hasattr(found, "fn") else None
        return None

    def _value(self, tree: ast.expr) -> bool | None:
        """True or false where constants decide it, else None."""
        value = self._evaluated(tree)
        return None if value is _UNKNOWN else bool(value)

    def _evaluated(self, tree: ast.expr) -> Any:
        names = {part.id for part in ast.walk(tree) if isinstance(part, ast.Name)}
        if any(name in self.points_to and name not in self.constants for name in names):
            return _UNKNOWN
        found = {name: self.constants.get(name, self.globals.get(name, _UNKNOWN)) for name in names}
        if _UNKNOWN in found.values():
            return _UNKNOWN
        found = {name: getattr(value, "value", value) for name, value in found.items()}
        try:
            return eval(
                compile(ast.Expression(tree), "<kernel>", "eval"), {"__builtins__": {"isinstance": isinstance}}, found
            )
        except Exception:  # anything that only a compiler knows
            return _UNKNOWN


_UNKNOWN = object()


def _parts(call: ast.Call) -> Iterator[ast.expr]:
    yield from call.args
    yield from (keyword.value for keyword in call.keywords)
