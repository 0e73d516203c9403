"""What every command-line program shares: exit codes, one-line errors, progress bars, ``--json FILE``."""

import argparse
import os
import sys
import warnings
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
    # On import Megatron-Core warns once for every optional library that is missing, on every rank.
    for module in (r"megatron\.core", r"torch\.autograd\.graph", r"torch\.distributed", "contextlib"):
        warnings.filterwarnings("ignore", module=module)
    try:
        main()
    except UserError as error:
        rank = int(os.environ.get("RANK", 0))
        # Before the ranks are joined all of them meet the same error; afterwards it may be one rank's own.
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
    """A ``tqdm`` bar on standard error; silent when that is not a terminal, so logs stay readable."""
    return tqdm(items, disable=not sys.stderr.isatty(), dynamic_ncols=True, **options)


def duration(seconds: float) -> str:
    """``1:02:03``, ``2:03``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
