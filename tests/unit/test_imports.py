"""The structure of the code: no circles, imports only downwards through the layers of README.md, short files."""

import ast
from pathlib import Path

import pytest

from support.import_graph import Graph, by_member, circles, module_graph, read_layers, upward_imports
from support.programs import ROOT

README = (ROOT / "README.md").read_text()
GRAPH = module_graph(ROOT / "megatron_ext")
LONGEST_FILE, LONGEST_FUNCTION, LONGEST_README = 350, 60, 149
SOURCES = [
    ROOT / "pretrain_unified.py",
    *(file for folder in ("megatron_ext", "tools", "benchmarks") for file in sorted((ROOT / folder).rglob("*.py"))),
]


def test_no_module_imports_itself_through_others():
    assert not circles(GRAPH), "\n".join(circles(GRAPH))


def test_no_package_imports_itself_through_others():
    assert not circles(by_member(GRAPH)), "\n".join(circles(by_member(GRAPH)))


def test_the_layers_of_the_readme_name_every_member_once():
    assert sorted(member for layer in read_layers(README) for member in layer) == sorted(by_member(GRAPH))


def test_imports_go_down_through_the_layers():
    upward = upward_imports(GRAPH, read_layers(README))
    assert not upward, "\n".join(upward)


def test_the_readme_is_short():
    length = len(README.splitlines())
    assert length <= LONGEST_README


def test_files_are_short():
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in SOURCES}
    longer = [f"{name}: {length} lines" for name, length in lengths.items() if length > LONGEST_FILE]
    assert not longer, "\n".join(longer)


def test_functions_are_short():
    lengths = {}
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lengths[f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"] = node.end_lineno - node.lineno + 1
    longer = [f"{name}: {length} lines" for name, length in lengths.items() if length > LONGEST_FUNCTION]
    assert not longer, "\n".join(longer)


INVENTED = {
    "high.py": "import invented.middle.b",
    "middle/__init__.py": "",
    "middle/b.py": "from invented.low import a",
    "low/__init__.py": "",
    "low/a.py": "import json",
    "__init__.py": "",
}
LAYERS = read_layers("# Invented\n\n## Layers\n\nLowest first:\n\n```\nlow\nmiddle\nhigh\n```\n\n## Next\n")


def invented(folder: Path, **changed: str) -> Graph:
    """The graph of three layers, of which modules in ``changed`` have other sources."""
    for name, source in (INVENTED | {f"{name.replace('_', '/')}.py": text for name, text in changed.items()}).items():
        file = folder / "invented" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    return module_graph(folder / "invented")


def test_imports_that_go_down_pass(tmp_path):
    graph = invented(tmp_path)
    assert graph["invented.high"] == {"invented.middle.b"} and graph["invented.middle.b"] == {"invented.low.a"}
    assert circles(graph) == circles(by_member(graph)) == upward_imports(graph, LAYERS) == []


@pytest.mark.parametrize(
    "source",
    [
        "import invented.high",
        "import invented.high as top",
        "from invented import high",
        "from invented.high import name",
        "from ..high import name",
        "def function():\n    from invented.high import name",
        "if TYPE_CHECKING:\n    from invented.high import name",
    ],
)
def test_a_circle_and_an_upward_import_are_named(tmp_path, source):
    graph = invented(tmp_path, low_a=source)
    assert circles(graph) == ["invented.high -> invented.middle.b -> invented.low.a -> invented.high"]
    assert circles(by_member(graph)) == ["high -> middle -> low -> high"]
    assert upward_imports(graph, LAYERS) == ["invented.low.a -> invented.high"]


def test_packages_in_a_circle_are_named_where_no_module_is_in_one(tmp_path):
    graph = invented(tmp_path, low_c="import invented.middle.b")
    assert circles(graph) == []
    assert circles(by_member(graph)) == ["low -> middle -> low"]
    assert upward_imports(graph, LAYERS) == ["invented.low.c -> invented.middle.b"]
    assert upward_imports(graph, [["low", "middle"], ["high"]]) == []
