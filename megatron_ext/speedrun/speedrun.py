"""A submission from its file to its row."""

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from megatron_ext.errors import UserError
from megatron_ext.files import read_json, write_json
from megatron_ext.preprocess.picture_world import prepare
from megatron_ext.preprocess.recipe import read_recipe
from megatron_ext.speedrun import commit, questions, submission
from megatron_ext.speedrun.experiment import ALLOWANCE, Cost, Experiment
from megatron_ext.speedrun.figures import MEAN, TASKS, figures
from megatron_ext.speedrun.frozen import Frozen, Rehearsal
from megatron_ext.speedrun.leaderboard import Kind, Leaderboard, Row
from megatron_ext.speedrun.origin import Origin, origin
from megatron_ext.speedrun.score import Score, score
from megatron_ext.speedrun.submission import Submission
from megatron_ext.study import steps

Mode = Literal["run", "verification", "rehearsal"]


@dataclass(frozen=True)
class Result:
    """The figures of each seed by split and task, and what they cost; the score, but of a rehearsal."""

    seeds: list[int]
    figures: dict[str, dict[str, list[float]]]
    cost: Cost
    score: Score | None


class Speedrun:
    """A submission in a round.

    Args:
        mode: verification: on the seeds and questions of the round's verification word. rehearsal: with few tokens,
            seeds and questions; its result is no row.
        say: prints a line.

    Raises:
        UserError: the round has no verification word yet.
    """

    def __init__(
        self,
        frozen: Frozen,
        entered: Submission,
        mode: Mode = "run",
        say: Callable[[str], None] = lambda line: print(line, flush=True),
    ):
        self.frozen, self.entered, self.mode, self._say = frozen, entered, mode, say
        self.board = Leaderboard(Path(frozen.leaderboard))
        self._word = frozen.verification_word if mode == "verification" else ""
        if mode == "verification" and not self._word:
            raise UserError(
                f"round {frozen.round} has no verification_word yet; until it ends, only who has it verifies"
            )

    @cached_property
    def experiment(self) -> Experiment:
        """The runs, in a folder named after what is run."""
        frozen, few = self.frozen, self._few
        out = self._folder / f"{self.entered.name}-{self.entered.digest[:8]}"
        seeds = submission.seeds(frozen, self.entered.digest, self._word)[: few.seeds if few else None]
        return Experiment(frozen, self.entered, out, few.tokens if few else frozen.tokens, seeds, self._questions)

    def prepare(self) -> None:
        """Prepare the world and the questions, as far as they are not there.

        Raises:
            UserError: a folder holds other files.
        """
        recipe = read_recipe(self.frozen.recipe)
        prepare(recipe, Path(self.frozen.world), self._say)
        word = hashlib.sha256(self._word.encode()).hexdigest()
        pictures = self._few.pictures if self._few else self.frozen.questions.pictures
        questions.write(
            self._questions, recipe, pictures, int(word[:7], 16) if self._word else self.frozen.questions.seed
        )

    def check_entry(self, free: list[Path]) -> str:
        """Check that a run may become a row, before it is run. Returns the commit.

        Args:
            free: files that may differ from the commit.

        Raises:
            UserError: the tree is not that of a known commit; the recipe or its name has a row; or dense has none.
        """
        known = commit.known_commit(steps.ROOT, [*free, self.board.folder, self.board.page])
        if row := self.board.find(self.frozen, self._kind, self.entered.digest):
            raise UserError(f"{self.board.folder}: has this recipe already, as {row.name} with {row.score:.3f}")
        if self.mode == "run" and self.board.has(self.frozen, self.entered.name):
            raise UserError(
                f"{self.board.folder}: round {self.frozen.round} has another recipe named {self.entered.name}"
            )
        if not self._is_reference:
            self._dense()
        file = self.experiment.out / "commit.json"
        begun = read_json(file) if file.is_file() else known
        if begun != known:
            raise UserError(
                f"{self.experiment.out}: was begun at commit {begun[:10]}; check that out or remove the folder"
            )
        write_json(file, known)
        return known

    def origin(self, known: str) -> Origin:
        """What a row at the commit ``known`` is made with; everything must be prepared.

        Raises:
            UserError: of a verification: code or data differ from those with which dense was verified.
        """
        own = origin(steps.ROOT, known, self.entered.config.data, self._questions)
        if self.mode == "verification" and (others := self._differs(own)):
            raise UserError(
                f"{self.entered.name}: {' and '.join(others)} differ from those of dense's verification at commit "
                f"{self._dense().commit[:10]}; verify all at the same commit"
            )
        return own

    def check_estimate(self) -> float:
        """The estimate of FLOPs relative to lossless dense.

        Raises:
            UserError: it is far above the cap.
        """
        ratio = self.experiment.estimated_flops_ratio()
        self._check_flops(ratio, self.frozen.flops_cap + ALLOWANCE, "an estimate of ")
        return ratio

    def run(self, jobs: int) -> Result:
        """Run what is left to run.

        Raises:
            UserError: a run failed, or a signal arrived; the same command goes on.
        """
        self.experiment.execute(jobs, is_forked=self.mode == "rehearsal")
        each = [figures(self.experiment.questions, answers) for answers in self.experiment.answers()]
        gathered = {split: {task: [f[split][task] for f in each] for task in TASKS} for split in each[0]}
        scored = None
        if self.mode != "rehearsal":
            dense = gathered if self._is_reference else self._dense().figures
            scored = score(gathered[MEAN], dense[MEAN], self.frozen.level)
        return Result(self.experiment.seeds, gathered, self.experiment.cost(), scored)

    def enter(self, result: Result, made: Origin, author: str) -> Row:
        """Add the row of a result to the leaderboard.

        Raises:
            UserError: it exceeds a cap, or its steps were too few to be timed.
        """
        cost, scored = result.cost, result.score
        self._check_flops(cost.flops_ratio, self.frozen.flops_cap, "")
        if cost.step_ratio is None:
            raise UserError(
                f"round {self.frozen.round}: 'tokens' and 'calibration_steps' give too few steps to be timed"
            )
        if cost.step_ratio > self.frozen.step_cap and not self.entered.is_dense:
            raise UserError(
                f"{self.entered.name}: a step takes {cost.step_ratio:.2f} x the time of lossless dense, "
                f"the cap is {self.frozen.step_cap}"
            )
        row = Row(
            name=self.entered.name,
            author=author,
            kind=self._kind,
            round=self.frozen.round,
            attempt=self.board.attempts(self.frozen, author) + (self.mode == "run"),
            is_dense=self.entered.is_dense,
            **dataclasses.asdict(scored),
            **dataclasses.asdict(cost),
            seeds=result.seeds,
            figures=result.figures,
            **dataclasses.asdict(made),
            differs=self._differs(made),
            digest=self.entered.digest,
            frozen=self.frozen.digest,
            settings=self.entered.tree,
        )
        self.board.append(row)
        return row

    def _check_flops(self, ratio: float, cap: float, what: str) -> None:
        if ratio > cap and not self.entered.is_dense:
            raise UserError(
                f"{self.entered.name}: {what}{ratio:.3f} x the FLOPs of lossless dense, "
                f"the cap is {self.frozen.flops_cap}"
            )

    def _differs(self, made: Origin) -> list[str]:
        """Which of code and data are others than in dense's row."""
        if self._is_reference:
            return []
        dense = self._dense()
        return made.differs(dense.code, dense.data)

    @property
    def _kind(self) -> Kind:
        """The kind of row that the result is, or would be."""
        return "verification" if self.mode == "verification" else "run"

    @property
    def _few(self) -> Rehearsal | None:
        return self.frozen.rehearsal if self.mode == "rehearsal" else None

    @property
    def _folder(self) -> Path:
        return Path(self.frozen.output) / f"round{self.frozen.round}" / self.mode

    @property
    def _questions(self) -> Path:
        return self._folder / "questions"

    @property
    def _reference(self) -> Submission:
        return submission.read(Path(self.frozen.reference), self.frozen)

    @property
    def _is_reference(self) -> bool:
        return self.entered.digest == self._reference.digest

    def _dense(self) -> Row:
        """The row of dense that the submission is relative to."""
        row = self.board.find(self.frozen, self._kind, self._reference.digest)
        if row is None:
            raise UserError(
                f"{self.board.folder}: round {self.frozen.round} has no {self._kind} of {self.frozen.reference}, "
                "which all others are relative to; run it first"
            )
        if row.frozen != self.frozen.digest:
            raise UserError(f"round {self.frozen.round}: what is frozen has changed since dense was run; begin a round")
        return row
