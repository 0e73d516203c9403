"""What every command-line program shares: exit codes, one-line errors, progress bars, ``--json``."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from tqdm import tqdm

from megatron_ext.errors import UserError


def parser(description: str, example: str) -> argparse.ArgumentParser:
    """An argument parser whose ``--help`` ends in a worked example, with the ``--json FILE`` that every tool has."""
    made = argparse.ArgumentParser(
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers of this run to FILE")
    return made


def run(main: Callable[[], dict | None]) -> None:
    """Call ``main`` and leave the process: 0 on success, 1 with one line on a :class:`UserError`, 2 on bad usage
    (argparse's own)."""
    try:
        main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def progress(items: Iterable | None = None, **options) -> tqdm:
    """A ``tqdm`` bar on standard error; silent when that is not a terminal, so logs stay readable."""
    return tqdm(items, disable=not sys.stderr.isatty(), dynamic_ncols=True, **options)


def write_json(path: Path, value) -> None:
    """Write ``value`` as JSON so that a reader sees either the whole file or none: a temporary file, then a rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)
