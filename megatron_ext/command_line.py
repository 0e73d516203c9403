"""Shared parts of the command-line programs: exit codes, one-line errors, progress, ``--json FILE``."""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tqdm import tqdm

from megatron_ext.errors import UserError


def parser(description: str, example: str, **options) -> argparse.ArgumentParser:
    """An argument parser whose ``--help`` ends with an example, with the ``--json FILE`` that every tool has.

    Args:
        options: as of ``ArgumentParser``.
    """
    result = _parser_with_example(description, example, **options)
    result.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers of this run to FILE")
    return result


def commands(description: str, example: str) -> tuple[argparse.ArgumentParser, argparse._SubParsersAction]:
    """A parser of a tool with commands, and what adds them: ``add_parser(name, help=, description=, example=)``, each
    with its own ``--json FILE``."""
    result = _parser_with_example(description, example)
    return result, result.add_subparsers(metavar="COMMAND", required=True, parser_class=parser)


def _parser_with_example(description: str, example: str, **options) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )


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
    """A ``tqdm`` bar on standard error, with the state of the whole that it is a part of (:class:`Whole`); disabled
    without a terminal, to keep logs readable."""
    return _Bar(items, disable=not sys.stderr.isatty(), dynamic_ncols=True, **options)


LEAST_GAIN = 0.01
"""Part of a whole that a process does before it says what time is left."""


class Whole:
    """How far a whole is that has several parts: processes, and steps of one process.

    A script sets the environment variable ``PROGRESS_OF_WHOLE`` to "DONE,SHARE" for each process: the per cent of the
    whole that is done before this process, and the per cent that this process is. A program divides its own share with
    :meth:`part`. The time left is that of the whole at the speed of this process.

    Raises:
        UserError: the variable is malformed.
    """

    def __init__(self):
        self._start, self._share = 0.0, 0.0
        self._first: tuple[float, float] | None = None  # (time, done) at first
        if text := os.environ.get("PROGRESS_OF_WHOLE"):
            try:
                start, share = map(float, text.split(","))
            except ValueError:
                raise UserError(f"PROGRESS_OF_WHOLE={text}: expected DONE,SHARE, two numbers of per cent") from None
            self._start, self._share = start / 100, share / 100

    @contextmanager
    def work(self) -> Iterator[None]:
        """What runs inside is a whole of its own if no script says what this process is a part of."""
        before = self._share, self._first
        self._share, self._first = self._share or 1.0, (time.monotonic(), self._start)
        try:
            yield
        finally:
            self._share, self._first = before

    @contextmanager
    def part(self, start: float, stop: float) -> Iterator[None]:
        """What runs inside is the stretch from ``start`` to ``stop``, 0 .. 1, of what was the part before."""
        before = self._start, self._share
        self._start, self._share = self._start + start * self._share, (stop - start) * self._share
        try:
            yield
        finally:
            self._start, self._share = before

    def state(self, fraction: float) -> str:
        """Such as ``whole 62 %, 2:10 left``, when a ``fraction`` of the present part is done; empty without a whole."""
        if not self._share:
            return ""
        now, done = time.monotonic(), min(1.0, self._start + fraction * self._share)
        self._first = self._first or (now, done)
        first, done_at_first = self._first
        gained = done - done_at_first
        left = f", {duration((now - first) * (1 - done) / gained)} left" if gained >= LEAST_GAIN else ""
        return f"whole {100 * done:.0f} %{left}"


@cache
def whole() -> Whole:
    """The whole that this process is a part of."""
    return Whole()


class _Bar(tqdm):
    """A bar that ends with the state of the whole."""

    @property
    def format_dict(self) -> dict:
        values = super().format_dict
        if values["ncols"]:
            values["ncols"] -= len(self._state)
        return values

    def __str__(self) -> str:
        return super().__str__() + self._state

    @property
    def _state(self) -> str:
        state = whole().state(min(1.0, self.n / self.total) if self.total else 0.0)
        return f" | {state}" if state else ""


def duration(seconds: float) -> str:
    """Seconds as ``1:02:03`` or ``2:03``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def cpu_seconds() -> float:
    """CPU time of this process so far, and of its processes that have ended."""
    return sum(os.times()[:4])
