"""Shared parts of the command-line programs: exit codes, one-line errors, progress bars, ``--json FILE``."""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from tqdm import tqdm

from megatron_ext.errors import UserError


def parser(description: str, example: str) -> argparse.ArgumentParser:
    """An argument parser whose ``--help`` ends with an example, with the ``--json FILE`` that every tool has."""
    result = argparse.ArgumentParser(
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers of this run to FILE")
    return result


def run(main: Callable[[], dict | None]) -> None:
    """Call ``main``. The process exits with 0 on success, 1 and a one-line message on a :class:`UserError`, 2 on bad
    usage (from argparse), 130 on an interrupt."""
    # On import, every rank of Megatron-Core warns about each missing optional library.
    for module in (r"megatron\.core", r"torch\.autograd\.graph", r"torch\.distributed", "contextlib"):
        warnings.filterwarnings("ignore", module=module)
    try:
        main()
    except UserError as error:
        rank = int(os.environ.get("RANK", 0))
        # Before the ranks join, all of them fail with the same error; afterwards a single rank may fail.
        if rank == 0 or _joined():
            print(f"{Path(sys.argv[0]).name}: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _joined() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def progress(items: Iterable | None = None, **options) -> tqdm:
    """A ``tqdm`` bar on standard error; disabled without a terminal, to keep logs readable."""
    return tqdm(items, disable=not sys.stderr.isatty(), dynamic_ncols=True, **options)


def duration(seconds: float) -> str:
    """Seconds as ``1:02:03`` or ``2:03``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
