"""What a module imports from Transformer Engine and calls of it, found in its source and held against signatures."""

import ast
import inspect
from collections.abc import Container, Iterator
from dataclasses import dataclass

from support.source_signatures import PACKAGE, Definition, Sources, dotted


@dataclass(frozen=True)
class Call:
    """A call at ``where``: of ``target`` with so many positional arguments and these keywords. unread: there is also a
    ``*`` or ``**`` whose contents the source does not show."""

    where: str
    target: str
    signature: inspect.Signature
    positional: int
    keywords: tuple[str, ...]
    unread: bool

    def error(self) -> str | None:
        """Why the signature does not take these arguments; None when it does."""
        bind = self.signature.bind_partial if self.unread else self.signature.bind
        try:
            bind(*range(self.positional), **dict.fromkeys(self.keywords))
        except TypeError as error:
            return f"{self.where}: {self.target}{self.signature}: {error}"
        return None


class Caller:
    """One module that uses Transformer Engine."""

    def __init__(self, sources: Sources, name: str):
        self._sources, self._module = sources, sources.module(name)
        self._left_out = {
            node
            for attempt in ast.walk(self._module.tree)
            if isinstance(attempt, ast.Try) and any(self._fails(x) for x in attempt.body)
            for statement in attempt.body
            for node in ast.walk(statement)
        }

    def _fails(self, node: ast.stmt) -> bool:
        """Whether a statement imports what Transformer Engine has not."""
        return (
            isinstance(node, ast.ImportFrom)
            and _is_package(node.module)
            and any(self._sources.resolve(self._module, a.asname or a.name, {}) is None for a in node.names)
        )

    def missing(self, dispensable: Container[str] = ()) -> list[str]:
        """What the module names of Transformer Engine that is not there, but for what it can do without."""
        return [
            f"{self._module.name}:{node.lineno}: {name} is not there"
            for node, name, definition in self._names()
            if definition is None and name not in dispensable
        ]

    def _names(self) -> Iterator[tuple[ast.AST, str, Definition | None]]:
        for node, scope, _ in _walk(self._module.tree):
            if isinstance(node, ast.ImportFrom) and _is_package(node.module):
                for alias in node.names:
                    name = alias.asname or alias.name
                    yield node, name, self._sources.resolve(self._module, name, scope)
            elif isinstance(node, ast.Attribute) and (name := dotted(node)) and self._is_ours(name, scope):
                yield node, name, self._sources.resolve(self._module, name, scope)

    def _is_ours(self, name: str, scope: dict[str, ast.AST]) -> bool:
        first = name.partition(".")[0]
        match scope.get(first, self._module.names.get(first)):
            case ast.Import(names):
                return any(_is_package(alias.name) for alias in names)
            case ast.ImportFrom(module):
                return _is_package(module)
        return False

    def calls(self) -> Iterator[Call]:
        """Calls whose target Transformer Engine defines, but for those after an import that fails and is caught."""
        for node, scope, enclosing in _walk(self._module.tree):
            if not isinstance(node, ast.Call) or node in self._left_out:
                continue
            definition = self._target(node.func, scope, enclosing)
            if definition is None or not _is_package(definition.module.name):
                continue
            signature = self._sources.signature(definition)
            if signature is None:
                continue
            keywords, unread = self._keywords(node, enclosing)
            positional = [x for x in node.args if not isinstance(x, ast.Starred)]
            yield Call(
                where=f"{self._module.name}:{node.lineno}",
                target=f"{definition.module.name}.{definition.node.name}",
                signature=signature,
                positional=len(positional),
                keywords=tuple(keywords),
                unread=unread or len(positional) < len(node.args),
            )

    def _target(self, called: ast.expr, scope: dict, enclosing: list[ast.AST]) -> Definition | None:
        match called:
            case ast.Attribute(ast.Call(ast.Name("super"), arguments), method):
                inner = next(x for x in reversed(enclosing) if isinstance(x, ast.ClassDef))
                after = Definition(self._module, inner)
                if arguments:
                    after = self._sources.resolve(self._module, dotted(arguments[0]), scope)
                return self._sources.method(list(self._sources.bases(after, scope))[1:], method)
        name = dotted(called)
        return self._sources.resolve(self._module, name, scope) if name and self._is_ours(name, scope) else None

    def _keywords(self, call: ast.Call, enclosing: list[ast.AST]) -> tuple[list[str], bool]:
        """Names of the keyword arguments, and whether some could not be read."""
        names, unread = [], False
        functions = [x for x in enclosing if isinstance(x, ast.FunctionDef)]
        for keyword in call.keywords:
            keys = [keyword.arg] if keyword.arg else self._keys(keyword.value, functions)
            names += keys or []
            unread |= keys is None
        return list(dict.fromkeys(names)), unread

    def _keys(self, value: ast.expr, functions: list[ast.FunctionDef]) -> list[str] | None:
        """Keys of a dictionary that a ``**`` stands before; None where they cannot be read."""
        match value:
            case ast.Dict(keys) if all(isinstance(key, ast.Constant) for key in keys):
                return [key.value for key in keys]
            case ast.Call(ast.Name(name)) if isinstance(function := self._module.names.get(name), ast.FunctionDef):
                returned = next(x.value for x in ast.walk(function) if isinstance(x, ast.Return))
                return self._keys(returned, [function])
            case ast.Name(name) if functions:
                keys_of, keys = None, []
                for node in ast.walk(functions[-1]):
                    match node:
                        case ast.Assign([ast.Name(target)], assigned) | ast.AnnAssign(ast.Name(target), _, assigned):
                            keys_of = (
                                self._keys(assigned, functions) if target == name and assigned is not value else keys_of
                            )
                        case ast.Assign([ast.Subscript(ast.Name(target), ast.Constant(key))]) if target == name:
                            keys.append(key)
                return None if keys_of is None else keys_of + keys
        return None


def _walk(
    node: ast.AST, scope: dict[str, ast.AST] | None = None, enclosing: tuple[ast.AST, ...] = ()
) -> Iterator[tuple[ast.AST, dict[str, ast.AST], list[ast.AST]]]:
    """Every node, with what the functions around it import and the functions and classes around it."""
    scope = scope or {}
    yield node, scope, list(enclosing)
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        enclosing = (*enclosing, node)
    if isinstance(node, ast.FunctionDef):
        imports = [x for x in ast.walk(node) if isinstance(x, ast.Import | ast.ImportFrom)]
        scope = scope | {a.asname or a.name.partition(".")[0]: x for x in imports for a in x.names}
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, scope, enclosing)


def _is_package(name: str | None) -> bool:
    return (name or "").split(".")[0] == PACKAGE
