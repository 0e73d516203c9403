"""The rows of the speedrun, a file for each, and their tables in its page.

::

    docs/speedrun/round1/NAME.json                 a run
    docs/speedrun/round1/NAME.verification.json    its verification
    docs/speedrun.md                               the page
"""

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
        is_dense: whether the plan is that of lossless dense, which has no rank.
        flops_ratio, step_ratio, core_hours, wall_seconds, cpu_seconds: see :class:`~.experiment.Cost`.
        figures: split -> task -> chance-corrected figure of each seed, in per cent.
        understanding, generation: of each seed, relative to dense.
        commit, code, data: see :class:`~.origin.Origin`.
        differs: those of code and data that are others than in dense's row.
    """

    name: str
    author: str
    kind: Kind
    round: int
    attempt: int
    is_dense: bool
    score: float
    understanding: list[float]
    generation: list[float]
    flops_ratio: float
    step_ratio: float
    core_hours: float
    wall_seconds: float
    cpu_seconds: float
    seeds: list[int]
    figures: dict
    commit: str
    code: str
    data: str
    differs: list[str]
    digest: str
    frozen: str
    settings: dict


class Leaderboard:
    """The rows in a folder; the page of the same name gets their tables."""

    def __init__(self, folder: Path):
        self.folder, self.page = Path(folder), Path(folder).with_suffix(".md")

    @property
    def rows(self) -> list[Row]:
        """All rows, by the names of their files.

        Raises:
            UserError: a file is malformed.
        """
        files = sorted(self.folder.glob("round*/*.json"))
        return [config_file.from_tree(Row, read_json(file), str(file)) for file in files]

    def find(self, frozen: Frozen, kind: Kind, digest: str) -> Row | None:
        """The row of a submission in this round."""
        return next((row for row in self._of(frozen, kind) if row.digest == digest), None)

    def named(self, frozen: Frozen, name: str) -> Row:
        """The run of this name in this round.

        Raises:
            UserError: there is none.
        """
        rows = {row.name: row for row in self._of(frozen, "run")}
        if name not in rows:
            known = ", ".join(rows) or "no rows"
            raise UserError(f"{self.folder}: round {frozen.round} has no row {name!r}; it has {known}")
        return rows[name]

    def has(self, frozen: Frozen, name: str) -> bool:
        """Whether a run in this round has this name."""
        return any(row.name == name for row in self._of(frozen, "run"))

    def attempts(self, frozen: Frozen, author: str) -> int:
        """The number of an author's runs in this round."""
        return sum(row.author == author for row in self._of(frozen, "run"))

    def append(self, row: Row) -> None:
        """Write the file of a row, and the page; other processes may do so, too."""
        kind = "" if row.kind == "run" else f".{row.kind}"
        write_json(self.folder / f"round{row.round}" / f"{row.name}{kind}.json", asdict(row))
        lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
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


def tables(rows: Sequence[Row]) -> str:
    """The rows of each round, the newest first; below them the figures of each seed. In Markdown.

    Verified submissions are ranked, by the scores of their verification; below them are the others, by the scores that
    they claim. Dense has a table of its own.
    """
    text = ""
    for number in sorted({row.round for row in rows}, reverse=True):
        of_round = [row for row in rows if row.round == number]
        verified = {row.digest: row.score for row in of_round if row.kind == "verification"}
        runs = [row for row in of_round if row.kind == "run"]
        runs.sort(key=lambda row: (row.digest not in verified, -verified.get(row.digest, row.score)))
        lines = [f"### Round {number}", ""]
        contenders, dense = [row for row in runs if not row.is_dense], [row for row in runs if row.is_dense]
        ranked = [_ranked(rank, row, verified) for rank, row in enumerate(contenders, 1)]
        lines += [*_table(["rank", *_HEAD], ranked), ""] if contenders else []
        lines += ["Lossless dense:", "", *_table(_HEAD, (_cells(row, verified) for row in dense)), ""] if dense else []
        lines += ["Above chance, in per cent, of each seed:", ""]
        head = ["submission", *(f"{task}, {new}" for task in TASKS for new in SPLITS.values())]
        lines += [*_table(head, map(_figures, of_round)), ""]
        text += "\n".join(["", *lines])
    return f"{text}\n" if text else "\nNo rows yet.\n\n"


_HEAD = ["submission", "verified", "claimed", "U", "G", "FLOPs", "step", "core-hours", "attempt", "author", "commit"]
_HEAD += ["recipe"]


def _ranked(rank: int, row: Row, verified: dict[str, float]) -> list[str]:
    return [str(rank) if row.digest in verified else "", *_cells(row, verified)]


def _cells(row: Row, verified: dict[str, float]) -> list[str]:
    cells = [row.name, f"{verified[row.digest]:.3f}" if row.digest in verified else "", f"{row.score:.3f}"]
    cells += [_each(row.understanding, 2), _each(row.generation, 2)]
    cells += [f"{row.flops_ratio:.3f}", f"{row.step_ratio:.2f}", f"{row.core_hours:.2f}", str(row.attempt)]
    commit = ", ".join([f"`{row.commit[:10]}`", *(f"other {what}" for what in row.differs)])
    return [*cells, _escaped(row.author), commit, f"`{row.digest[:8]}`"]


def _figures(row: Row) -> list[str]:
    name = row.name if row.kind == "run" else f"{row.name}, {row.kind}"
    return [name, *(_each(row.figures[split][task], 1) for task in TASKS for split in SPLITS)]


def _escaped(text: str) -> str:
    """Text as a cell of a table that shows it as it is."""
    return re.sub(r"([\\`*_\[\]<>&|~])", r"\\\1", " ".join(text.split()))


def _each(values: Sequence[float], digits: int) -> str:
    return " ".join(f"{value:.{digits}f}" for value in values)


def _table(head: list[str], body) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]
