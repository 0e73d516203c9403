"""The runs of a submission, by :mod:`megatron_ext.study`: training and evaluation with every seed, between short
trainings of lossless dense on the same rows, beside which time is measured."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_ext.command_line import cpu_seconds
from megatron_ext.errors import UserError
from megatron_ext.files import read_json, write_json
from megatron_ext.speedrun.frozen import Frozen
from megatron_ext.speedrun.submission import Submission
from megatron_ext.study import forked, grid, scheduler, status, steps
from megatron_ext.study.grid import StudyRun
from megatron_ext.study.study_file import Method, Size, Study, StudyBenchmark, StudyEvaluation
from megatron_ext.training.metrics import read_metrics

TRAINED = "trained"
WARM_UP = 5
"""First steps that are not timed: memory is allocated in them."""
TIMED = 20
"""Fewest steps that tell a time."""
ALLOWANCE = 0.02
"""Part of the cap by which an estimate of FLOPs on few rows may exceed it."""


@dataclass(frozen=True)
class Cost:
    """What a submission costs.

    Attributes:
        flops_ratio: training FLOPs relative to lossless dense on the same rows, over all seeds.
        step_ratio: seconds of a training step relative to those of lossless dense; None: too few steps were timed.
        core_hours: of the training of all seeds, on the core of ``dense_step_seconds``; None: likewise.
        wall_seconds, cpu_seconds: of everything that was run here, evaluation included.
    """

    flops_ratio: float
    step_ratio: float | None
    core_hours: float | None
    wall_seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Experiment:
    """The runs of a submission in the folder ``out``.

    Attributes:
        tokens: of training, with every seed.
        questions: folder of gqa/ and mjhq/; None: without evaluation.
    """

    frozen: Frozen
    submission: Submission
    out: Path
    tokens: int
    seeds: list[int]
    questions: Path | None = None

    @property
    def iterations(self) -> int:
        """Training steps with a seed."""
        return max(2, round(self.submission.config.training.iterations * self.tokens / self.frozen.tokens))

    @cached_property
    def study(self) -> Study:
        """The submission with every seed."""
        whole = self.submission.config
        share = self.iterations / whole.training.iterations
        schedule = {key: getattr(whole.optimizer, key) for key in ("warmup_iterations", "wsd_decay_iterations")}
        schedule = {key: max(1, round(steps * share)) if steps else 0 for key, steps in schedule.items()}
        settings = dict(self.submission.settings)
        settings["optimizer"] = {**settings.get("optimizer", {}), **schedule}
        settings["training"] = {**settings.get("training", {}), "iterations": self.iterations}
        return self._study(self.submission.name, settings, self.seeds, self._evaluation)

    @cached_property
    def calibration(self) -> Study:
        """Some steps of lossless dense, half of the runs before and half after those of the study."""
        settings = {
            "plan": {"preset": "dense_lossless"},
            "data": self.submission.settings["data"],
            "training": {"iterations": self.frozen.calibration_steps, "validation_batches": 1},
            "optimizer": {"schedule": "constant", "warmup_iterations": 1},
            "checkpoint": {"interval": 0},
            "logging": {"interval": 1},
        }
        return self._study("calibration", settings, list(range(2 * max(1, len(self.seeds) // 2))), StudyEvaluation())

    @cached_property
    def runs(self) -> list[StudyRun]:
        """One for each seed.

        Raises:
            UserError: the configuration is refused.
        """
        return grid.runs(self.study)

    @cached_property
    def calibration_runs(self) -> list[StudyRun]:
        """Those of lossless dense."""
        return grid.runs(self.calibration)

    def estimated_flops_ratio(self) -> float:
        """Training FLOPs relative to lossless dense, on some rows of the data."""
        return self.runs[0].length.flops_ratio

    def execute(self, jobs: int, is_forked: bool = False) -> None:
        """Do what is left to do, ``jobs`` runs at once.

        Args:
            is_forked: start programs sooner, without counting their CPU-seconds.

        Raises:
            UserError: a run failed, or a signal arrived.
        """
        half = len(self.calibration_runs) // 2
        groups = [
            (self.calibration, self.calibration_runs[:half]),
            (self.study, self.runs),
            (self.calibration, self.calibration_runs[half:]),
        ]
        started, cpu_started, before = time.monotonic(), cpu_seconds(), self._seconds()
        try:
            for study, runs in groups:
                scheduler.execute(runs, study.evaluation, jobs, start=forked.start_program if is_forked else None)
                if failed := status.failed(study, runs):
                    raise UserError(f"{failed[0]}: failed; {study.output}/runs/{failed[0]}/log.txt says why")
        finally:
            now = [time.monotonic() - started, cpu_seconds() - cpu_started]
            write_json(self.out / "seconds.json", [a + b for a, b in zip(before, now)])

    def cost(self) -> Cost:
        """What the complete runs cost."""
        ratios = [read_json(run.folder / "result.json")["flops_ratio"] for run in self.runs]
        ratio = step_ratio(_timed(self.runs), _timed(self.calibration_runs))
        dense_hours = len(self.seeds) * self.iterations * self.frozen.dense_step_seconds / 3600
        return Cost(float(np.mean(ratios)), ratio, ratio and ratio * dense_hours, *self._seconds())

    def answers(self) -> list[Path]:
        """The folder of the answers of each seed."""
        return [steps.answers(run, TRAINED) for run in self.runs]

    @property
    def _evaluation(self) -> StudyEvaluation:
        if self.questions is None:
            return StudyEvaluation()
        options = self.frozen.questions.options
        benchmarks = [StudyBenchmark(name, str(self.questions / name)) for name in ("gqa", "mjhq")]
        benchmarks[0].options = options
        return StudyEvaluation(f"{self.frozen.world}/vq", benchmarks, {TRAINED: []})

    def _study(self, name: str, settings: dict, seeds: list[int], evaluation: StudyEvaluation) -> Study:
        return Study(
            name=name,
            output=str(self.out / name),
            base=self.frozen.base,
            sizes=[Size("frozen", {})],
            methods=[Method(name, "unified", name, settings)],
            seeds=seeds,
            settings=self.frozen.settings,
            evaluation=evaluation,
        )

    def _seconds(self) -> list[float]:
        """Seconds and CPU-seconds of all commands so far that worked on these runs."""
        file = self.out / "seconds.json"
        return read_json(file) if file.is_file() else [0.0, 0.0]


def step_ratio(own: Sequence[float], dense: Sequence[float]) -> float | None:
    """Seconds of a training step relative to those of dense, both as the lower quartile of the steps, because whatever
    else a machine does only adds to a step. None: one of them has under :data:`TIMED` steps."""
    if min(len(own), len(dense)) < TIMED:
        return None
    return float(np.quantile(own, 0.25) / np.quantile(dense, 0.25))


def _timed(runs: Sequence[StudyRun]) -> list[float]:
    """Seconds of the recorded steps of runs."""
    records = (record for run in runs for record in read_metrics(run.folder / "metrics.jsonl"))
    return [record["step_seconds"] for record in records if record["iteration"] > WARM_UP]
