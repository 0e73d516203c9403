"""Read a tree of dataclasses from YAML files and ``section.key=value`` overrides, strictly checked.

This module does not know what the keys mean (see :mod:`megatron_ext.config`). Every error names the key, the value and
what would be accepted. No library gives that with less code: pydantic in strict mode reads dataclasses only from JSON,
and its errors name neither the nearest key nor a union's plain path.
"""

import copy
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from megatron_ext.errors import UserError
from megatron_ext.files import write_text

T = TypeVar("T")


def load(schema: type[T], files: Sequence[str | Path] = (), overrides: Sequence[str] = ()) -> T:
    """Build ``schema`` from its defaults, then each file in order, then each ``section.key=value``.

    A later file or override replaces earlier scalars and lists; sections are merged key by key.

    Raises:
        UserError: a file cannot be read, or a key is unknown or has a value of the wrong type.
    """
    return from_trees(schema, [*map(read_yaml, files), *map(_parse_override, overrides)])


def from_trees(schema: type[T], trees: Iterable[dict]) -> T:
    """Build ``schema`` from nested dictionaries, merged in order as files are."""
    merged: dict = {}
    for tree in trees:
        _merge(merged, copy.deepcopy(tree))
    return from_tree(schema, merged)


def override(config: T, overrides: Sequence[str]) -> T:
    """Copy a dataclass tree and apply each ``section.key=value``.

    Raises:
        UserError: as for :func:`load`.
    """
    tree = to_tree(config)
    for text in overrides:
        _merge(tree, _parse_override(text))
    return from_tree(type(config), tree)


def read_yaml(file: str | Path) -> dict:
    """The mapping in a YAML file; empty for an empty file.

    Raises:
        UserError: the file cannot be read, is not YAML or is no mapping.
    """
    try:
        tree = yaml.load(Path(file).read_text(), Loader=_Loader)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not YAML ({' '.join(str(error).split())})") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{file}: expected a mapping of sections, got {type(tree).__name__}")
    return tree


def write_yaml(file: str | Path, config) -> None:
    """Write a dataclass tree; :func:`load` reads the same tree back."""
    write_text(Path(file), yaml.safe_dump(to_tree(config), sort_keys=False))


def to_tree(config) -> dict:
    """A dataclass tree as plain dictionaries and lists."""
    return dataclasses.asdict(config)


def from_tree(schema: type[T], tree: dict, where: str = "") -> T:
    """Build ``schema`` from nested dictionaries.

    Integers are accepted for floats and become floats; booleans are not integers.

    Args:
        where: dotted path of the tree, for messages.

    Raises:
        UserError: a key is unknown or missing, or a value has the wrong type.
    """
    hints = typing.get_type_hints(schema)
    names = {f.name for f in dataclasses.fields(schema)}
    values = {}
    for key, value in tree.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in names:
            close = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(sorted(names))}"
            raise UserError(f"config: unknown key '{path}' ({hint})")
        values[key] = _convert(hints[key], value, path)
    missing = [
        f.name
        for f in dataclasses.fields(schema)
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"config: '{where}' needs the key{'s' if len(missing) > 1 else ''} {', '.join(missing)}")
    return schema(**values)


def _convert(kind: Any, value: Any, path: str) -> Any:
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"config: '{path}' is a section (a mapping), got {value!r}")
        return from_tree(kind, value, path)
    if origin in (Union, types.UnionType):
        choices = typing.get_args(kind)
        if value is None and type(None) in choices:
            return None
        failure = None
        for choice in choices:
            if choice is type(None):
                continue
            try:
                return _convert(choice, value, path)
            except UserError as error:
                failure = failure or error
        raise failure
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise UserError(f"config: '{path}' is {value!r}, must be one of {', '.join(map(str, choices))}")
        return value
    if origin in (list, tuple):  # a tuple is of any length: tuple[item, ...]
        if not isinstance(value, list | tuple):
            raise UserError(f"config: '{path}' must be a list, got {value!r}")
        item = typing.get_args(kind)[0]
        return origin(_convert(item, v, f"{path}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"config: '{path}' must be a mapping, got {value!r}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise UserError(f"config: '{path}' must be {kind.__name__}, got {value!r}")
    return value


def _parse_override(text: str) -> dict:
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise UserError(f"override '{text}': expected section.key=value")
    try:
        tree: Any = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError:
        raise UserError(f"override '{text}': the value is not YAML") from None
    for key in reversed(path.split(".")):
        tree = {key: tree}
    return tree


def _merge(into: dict, tree: dict) -> None:
    for key, value in tree.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


class _Loader(yaml.SafeLoader):
    """Safe YAML 1.1 with the booleans and floats of YAML 1.2: ``off`` is a string, ``1e-4`` a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
