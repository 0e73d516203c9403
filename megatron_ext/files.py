"""JSON and text files, written atomically: whole or not at all."""

import json
import os
from pathlib import Path

from megatron_ext.errors import UserError


def write_json(path: Path, value) -> None:
    """Write ``value`` as JSON; whole or not at all, as :func:`write_text` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` so that a reader sees either the whole file or none: a temporary file, then a rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def read_json(path: Path):
    """The value in a JSON file.

    Raises:
        UserError: the file cannot be read or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
