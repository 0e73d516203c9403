"""The rows of the speedrun, and their tables in its page."""

import fcntl
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_ext import config_file
from megatron_ext.errors import UserError
from megatron_ext.files import read_json, write_json, write_text
from megatron_ext.speedrun.figures import TASKS
from megatron_ext.speedrun.frozen import Frozen
from megatron_ext.speedrun.questions import SPLITS

Kind = Literal["run", "verification"]


@dataclass
class Row:
    """A submission that was run, with what is needed to run it again.

    Attributes:
        settings: what its file says.
        digest, frozen: of the submission and of what was frozen.
        attempt: number of this author's runs in the round so far, with this one.
        flops_ratio, core_hours, wall_seconds, cpu_seconds: see :class:`~.experiment.Cost`.
        figures: split -> task -> chance-corrected figure of each seed, in per cent.
        understanding, generation: of each seed, relative to dense.
    """

    name: str
    author: str
    kind: Kind
    round: int
    attempt: int
    score: float
    understanding: list[float]
    generation: list[float]
    flops_ratio: float
    core_hours: float
    wall_seconds: float
    cpu_seconds: float
    seeds: list[int]
    figures: dict
    commit: str
    digest: str
    frozen: str
    settings: dict


class Leaderboard:
    """The rows in a JSON file; the page of the same name gets their tables."""

    def __init__(self, file: Path):
        self.file, self.page = Path(file), Path(file).with_suffix(".md")
        self.rows: list[Row] = []
        self._read()

    def find(self, frozen: Frozen, kind: Kind, digest: str) -> Row | None:
        """The row of a submission in this round."""
        return next((row for row in self._of(frozen, kind) if row.digest == digest), None)

    def named(self, frozen: Frozen, name: str) -> Row:
        """The newest run of this name in this round.

        Raises:
            UserError: there is none.
        """
        rows = self._of(frozen, "run")
        if not any(row.name == name for row in rows):
            known = ", ".join(dict.fromkeys(row.name for row in rows)) or "no rows"
            raise UserError(f"{self.file}: round {frozen.round} has no row {name!r}; it has {known}")
        return [row for row in rows if row.name == name][-1]

    def attempts(self, frozen: Frozen, author: str) -> int:
        """The number of an author's runs in this round."""
        return sum(row.author == author for row in self._of(frozen, "run"))

    def append(self, row: Row) -> None:
        """Add a row to both files; other processes may do so, too."""
        lock = os.open(self.file.parent, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._read()
            self.rows.append(row)
            write_json(self.file, [asdict(row) for row in self.rows])
            self.write_page()
        finally:
            os.close(lock)

    def write_page(self) -> None:
        """Write the tables into the page, between its marks.

        Raises:
            UserError: the page is missing or lacks the marks.
        """
        text = self.page.read_text() if self.page.is_file() else ""
        parts = re.split(r"(<!-- (?:end of )?leaderboard -->)\n?", text)
        if len(parts) != 5:
            raise UserError(f"{self.page}: needs the lines <!-- leaderboard --> and <!-- end of leaderboard -->")
        write_text(self.page, f"{parts[0]}{parts[1]}\n{tables(self.rows)}{parts[3]}\n{parts[4]}")

    def _of(self, frozen: Frozen, kind: Kind) -> list[Row]:
        return [row for row in self.rows if (row.round, row.kind) == (frozen.round, kind)]

    def _read(self) -> None:
        entries = read_json(self.file) if self.file.is_file() else []
        self.rows = [config_file.from_tree(Row, entry, f"rows[{i}]") for i, entry in enumerate(entries)]


def tables(rows: Sequence[Row]) -> str:
    """The rows of each round, the newest first, by score; below them the figures of each seed. In Markdown."""
    text = ""
    for number in sorted({row.round for row in rows}, reverse=True):
        of_round = sorted((row for row in rows if row.round == number), key=lambda row: -row.score)
        lines = [f"### Round {number}", "", *_table(_HEAD, map(_cells, of_round)), ""]
        lines += ["Above chance, in per cent, of each seed:", ""]
        head = ["submission", *(f"{task}, {new}" for task in TASKS for new in SPLITS.values())]
        lines += [*_table(head, map(_figures, of_round)), ""]
        text += "\n".join(["", *lines])
    return f"{text}\n" if text else "\nNo rows yet.\n\n"


_HEAD = ["submission", "score", "U", "G", "FLOPs", "core-hours", "attempt", "author", "commit", "recipe"]


def _cells(row: Row) -> list[str]:
    cells = [_name(row), f"{row.score:.3f}", _each(row.understanding, 2), _each(row.generation, 2)]
    cells += [f"{row.flops_ratio:.3f}", f"{row.core_hours:.2f}", str(row.attempt), row.author]
    return [*cells, f"`{row.commit[:10]}`", f"`{row.digest[:8]}`"]


def _figures(row: Row) -> list[str]:
    return [_name(row), *(_each(row.figures[split][task], 1) for task in TASKS for split in SPLITS)]


def _name(row: Row) -> str:
    return row.name if row.kind == "run" else f"{row.name}, {row.kind}"


def _each(values: Sequence[float], digits: int) -> str:
    return " ".join(f"{value:.{digits}f}" for value in values)


def _table(head: list[str], body) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]
