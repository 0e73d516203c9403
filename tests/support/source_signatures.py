"""Calls into Transformer Engine held against its Python sources, which are read and never imported.

A :class:`Sources` knows modules by their files: those of a version of Transformer Engine, of Megatron-Core, of this
package. It follows names through imports and classes through their bases, over packages, and leaves out branches that
another version would take. What calls it is in ``source_calls.py``.
"""

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from packaging.version import Version

PACKAGE = "transformer_engine"

_KNOWN = {"HAVE_TE": True, "TYPE_CHECKING": False}


@dataclass
class Definition:
    """What a name stands for. node: its class, function or assignment; None for a module, whose name it then is."""

    module: "Module"
    node: ast.AST | None


@dataclass
class Module:
    """A module by its file."""

    sources: "Sources"
    name: str
    path: Path
    names: dict[str, ast.AST] = field(default_factory=dict)

    def __post_init__(self):
        self.tree = ast.parse(self.path.read_text())
        self.sources.prune(self.tree)
        self._collect(self.tree.body)

    @property
    def package(self) -> str:
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]

    def _collect(self, body: list[ast.stmt]) -> None:
        """Names that statements bind, at the top of the module or in its branches."""
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                self.names[node.name] = node
            elif isinstance(node, ast.Assign):
                self.names.update({target.id: node for target in node.targets if isinstance(target, ast.Name)})
            elif isinstance(node, ast.Import | ast.ImportFrom):
                self.names.update({alias.asname or alias.name.partition(".")[0]: node for alias in node.names})
            elif isinstance(node, ast.Try):
                self._collect(node.body)
            elif isinstance(node, ast.If):
                self._collect([*node.body, *node.orelse])


class Sources:
    """Modules under ``roots``, as a program with a version of Transformer Engine would see them."""

    def __init__(self, version: str, *roots: Path):
        self.version, self._roots = Version(version), roots
        self.module = cache(self._module)

    def _module(self, name: str) -> Module | None:
        for root in self._roots:
            for path in (
                root.joinpath(*name.split(".")).with_suffix(".py"),
                root.joinpath(*name.split("."), "__init__.py"),
            ):
                if path.is_file():
                    return Module(self, name, path)
        return None

    def prune(self, tree: ast.Module) -> None:
        """Leave out the branches that are not taken with this version."""
        flags = dict(_KNOWN)
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and self._truth(node.value, {}):
                flags[node.targets[0].id] = True
        for node in ast.walk(tree):
            for name in ("body", "orelse"):
                if isinstance(block := getattr(node, name, None), list):
                    setattr(node, name, [kept for statement in block for kept in self._taken(statement, flags)])

    def _taken(self, statement: ast.stmt, flags: dict[str, bool]) -> list[ast.stmt]:
        truth = self._truth(statement.test, flags) if isinstance(statement, ast.If) else None
        if truth is None:
            return [statement]
        return [kept for inner in (statement.body if truth else statement.orelse) for kept in self._taken(inner, flags)]

    def _truth(self, test: ast.expr, flags: dict[str, bool]) -> bool | None:
        """Of a condition on Transformer Engine's version; None for other conditions."""
        match test:
            case ast.Name(name):
                return flags.get(name)
            case ast.UnaryOp(ast.Not(), operand):
                truth = self._truth(operand, flags)
                return None if truth is None else not truth
            case ast.BoolOp(op, values):
                decisive = isinstance(op, ast.Or)
                truths = [self._truth(value, flags) for value in values]
                return decisive if decisive in truths else None if None in truths else not decisive
            case ast.Call(ast.Name("is_te_min_version"), [ast.Constant(least), *equal], keywords):
                equal = [*equal, *(keyword.value for keyword in keywords)]
                strictly = bool(equal) and not equal[0].value
                return self.version > Version(least) if strictly else self.version >= Version(least)
            case ast.Compare(ast.Call(ast.Name("get_te_version")), [ast.Lt()], [ast.Call(_, [ast.Constant(least)])]):
                return self.version < Version(least)
        return None

    def resolve(self, module: Module, dotted: str, scope: dict[str, ast.AST] | None = None) -> Definition | None:
        """What a dotted name stands for in a module, or in a function whose own imports are ``scope``."""
        first, _, rest = dotted.partition(".")
        node = (scope or {}).get(first, module.names.get(first))
        if isinstance(node, ast.Import):
            alias = next(a for a in node.names if (a.asname or a.name.partition(".")[0]) == first)
            definition = self._definition_of_module(alias.name if alias.asname else first)
        elif isinstance(node, ast.ImportFrom):
            alias = next(a for a in node.names if (a.asname or a.name) == first)
            definition = self._imported(module, node, alias.name)
        elif node is not None:
            definition = Definition(module, node)
        else:
            definition = (
                self._definition_of_module(f"{module.name}.{first}") if module.path.name == "__init__.py" else None
            )
            definition = definition or self._starred(module, first)
        if not rest or definition is None:
            return definition
        if definition.node is None:
            return self.resolve(definition.module, rest) or self._definition_of_module(
                f"{definition.module.name}.{rest}"
            )
        return self.attribute(definition, rest) if isinstance(definition.node, ast.ClassDef) else definition

    def _imported(self, module: Module, node: ast.ImportFrom, name: str) -> Definition | None:
        base = node.module or ""
        if node.level:
            package = module.package.split(".")
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
        source = self.module(base)
        if source is None:
            # Of another package, such as the compiled one: there as far as can be seen.
            return None if base.split(".")[0] == PACKAGE else Definition(module, node)
        if source is module:
            return self._definition_of_module(f"{base}.{name}")
        return self.resolve(source, name) or self._definition_of_module(f"{base}.{name}")

    def _starred(self, module: Module, name: str) -> Definition | None:
        """A name that comes with an import of ``*``; one of a compiled package may have any name."""
        definitions = [
            self._imported(module, node, name)
            for node in module.tree.body
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
        ]
        return min(
            filter(None, definitions), key=lambda definition: isinstance(definition.node, ast.ImportFrom), default=None
        )

    def _definition_of_module(self, name: str) -> Definition | None:
        module = self.module(name)
        return module and Definition(module, None)

    def bases(self, definition: Definition, scope: dict[str, ast.AST] | None = None) -> Iterator[Definition]:
        """A class and what it derives from, in about the order in which methods are looked up."""
        yield definition
        for base in definition.node.bases:
            resolved = self.resolve(definition.module, dotted(base) or "", scope)
            if resolved and isinstance(resolved.node, ast.ClassDef):
                yield from self.bases(resolved)

    def method(self, owners: list[Definition], name: str) -> Definition | None:
        """The first method of that name among classes in the order of their look-up."""
        for owner in owners:
            for node in owner.node.body:
                if isinstance(node, ast.FunctionDef) and node.name == name:
                    return Definition(owner.module, node)
            if name == "__init__" and any("dataclass" in ast.dump(d) for d in owner.node.decorator_list):
                return owner
        return None

    def attribute(self, definition: Definition, name: str) -> Definition | None:
        """A method or an attribute that a class's body names; what an instance has is not looked for."""
        owners = list(self.bases(definition))
        assigned = [n for owner in owners for n in owner.node.body if isinstance(n, ast.Assign | ast.AnnAssign)]
        targets = [t.id for n in assigned for t in getattr(n, "targets", [n.target] if hasattr(n, "target") else [])]
        return definition if name in targets else self.method(owners, name)

    def signature(self, definition: Definition) -> inspect.Signature | None:
        """Of a function or a class; None where the source does not say."""
        if isinstance(definition.node, ast.ClassDef):
            constructor = self.method(list(self.bases(definition)), "__init__")
            if constructor is None:
                return None
            if isinstance(constructor.node, ast.ClassDef):
                owners = list(self.bases(constructor))
                return _of_fields([owner.node for owner in owners], self._is_of_pydantic(constructor.module))
            return _of_arguments(constructor.node, bound=True)
        if isinstance(definition.node, ast.FunctionDef):
            static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in definition.node.decorator_list)
            first = definition.node.args.args[0].arg if definition.node.args.args else ""
            return _of_arguments(definition.node, bound=first in ("self", "cls") and not static)
        return None

    @staticmethod
    def _is_of_pydantic(module: Module) -> bool:
        made_by = module.names.get("dataclass")
        return isinstance(made_by, ast.ImportFrom) and made_by.module.startswith("pydantic")


def dotted(node: ast.expr) -> str | None:
    """The name that an expression such as ``te.pytorch.Linear`` spells."""
    match node:
        case ast.Name(name):
            return name
        case ast.Attribute(value, name):
            return (before := dotted(value)) and f"{before}.{name}"
    return None


def _of_arguments(node: ast.FunctionDef, bound: bool) -> inspect.Signature:
    a, kinds = node.args, inspect.Parameter
    plain = [*a.posonlyargs, *a.args]
    required = len(plain) - len(a.defaults)
    parameters = [
        kinds(x.arg, kinds.POSITIONAL_OR_KEYWORD, default=kinds.empty if i < required else None)
        for i, x in enumerate(plain)
    ][bound:]
    if a.vararg:
        parameters.append(kinds(a.vararg.arg, kinds.VAR_POSITIONAL))
    parameters += [
        kinds(x.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else None)
        for x, default in zip(a.kwonlyargs, a.kw_defaults)
    ]
    if a.kwarg:
        parameters.append(kinds(a.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(parameters)


def _of_fields(owners: list[ast.ClassDef], ignores_others: bool) -> inspect.Signature:
    """Of a dataclass; pydantic's, unlike Python's own, ignore arguments that are no fields."""
    fields = {}
    for owner in reversed(owners):
        for node in owner.body:
            if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.dump(node.annotation):
                fields[node.target.id] = node.value
    kinds = inspect.Parameter
    required = [name for name, value in fields.items() if value is None]
    ordered = [*required, *(name for name in fields if name not in required)]
    parameters = [
        kinds(name, kinds.POSITIONAL_OR_KEYWORD, default=kinds.empty if name in required else None) for name in ordered
    ]
    return inspect.Signature([*parameters, kinds("ignored", kinds.VAR_KEYWORD)] if ignores_others else parameters)
