"""Which modules of a package import which, read from their sources, and what a graph of imports must not have."""

import ast
from collections import deque
from collections.abc import Iterator
from pathlib import Path

Graph = dict[str, set[str]]
"""What each module imports, by name."""


def module_graph(package: Path) -> Graph:
    """The modules of a package and the imports among them: at module level, in functions and for type checking alike.

    ``from package import name`` is an import of the module ``package.name`` where there is one, else of
    ``package/__init__.py``.
    """
    files = {_module_name(file, package): file for file in package.rglob("*.py")}
    return {
        name: {target for target in _imports(name, file, files) if target in files and target != name}
        for name, file in files.items()
    }


def _module_name(file: Path, package: Path) -> str:
    parts = file.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(name: str, file: Path, files: dict[str, Path]) -> Iterator[str]:
    parents = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join([*start, *filter(None, [node.module])])
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in files else base


def by_member(graph: Graph) -> Graph:
    """The graph of the package's members: its subpackages, each as a whole, and the modules beside them."""
    members: Graph = {}
    for name, targets in graph.items():
        if "." in name:
            imported = {target.split(".")[1] for target in targets if "." in target}
            members.setdefault(name.split(".")[1], set()).update(imported)
    return {name: targets - {name} for name, targets in members.items()}


def circles(graph: Graph) -> list[str]:
    """A shortest circle through each module that is on one, ``a -> b -> a``, every circle once."""
    shortest = {}
    for start in sorted(graph):
        if circle := _shortest_circle(graph, start):
            shortest.setdefault(frozenset(circle), " -> ".join(circle))
    return list(shortest.values())


def _shortest_circle(graph: Graph, start: str) -> list[str] | None:
    paths, queue = {}, deque([(start, [start])])
    while queue:
        name, path = queue.popleft()
        for target in sorted(graph[name]):
            if target == start:
                return [*path, start]
            if target not in paths:
                paths[target] = [*path, target]
                queue.append((target, paths[target]))
    return None


def read_layers(page: str) -> list[list[str]]:
    """The members of each layer, lowest first, from the fenced block under the heading "Layers" of a Markdown page."""
    section = page.partition("\n## Layers\n")[2]
    block = section.partition("```\n")[2].partition("```")[0]
    return [[member.strip() for member in line.split(",")] for line in block.splitlines() if line.strip()]


def upward_imports(graph: Graph, layers: list[list[str]]) -> list[str]:
    """The imports of a module in a higher layer than that of the importing module, ``package.a.x -> package.b.y``."""
    height = {member: number for number, layer in enumerate(layers) for member in layer}
    return sorted(
        f"{name} -> {target}"
        for name, targets in graph.items()
        for target in targets
        if "." in name and "." in target and height[target.split(".")[1]] > height[name.split(".")[1]]
    )
