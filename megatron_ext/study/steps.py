"""The steps of a run, as commands that can be stopped and repeated."""

import functools
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.evaluation.registry import BENCHMARKS
from megatron_ext.files import read_json, write_json
from megatron_ext.routing.plan import Plan, with_roles
from megatron_ext.study import state
from megatron_ext.study.grid import StudyRun
from megatron_ext.study.study_file import PICTURES, StudyBenchmark, StudyEvaluation

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Step:
    """A command; ``finish`` is called after it exited with 0, ``is_done`` tells whether the step is done."""

    name: str
    command: list[str]
    is_done: Callable[[], bool]
    finish: Callable[[], None] = lambda: None


def steps(run: StudyRun, evaluation: StudyEvaluation) -> Iterator[Step]:
    """Training, then an evaluation for each of ``evaluate_as``."""
    train = [str(ROOT / "pretrain_unified.py"), "--config", str(run.folder / "run.yaml")]
    yield Step("training", [*_launcher(run), *train], lambda: state.is_trained(run))
    for name, overrides in different_roles(run, evaluation).items():
        if benchmarks(run, evaluation):
            yield _evaluation(run, evaluation, name, overrides)


def check(runs: Sequence[StudyRun], evaluation: StudyEvaluation) -> None:
    """Check before training that evaluation will run.

    Raises:
        UserError: a benchmark, folder, part or override does not exist.
    """
    for benchmark in evaluation.benchmarks:
        if benchmark.name not in (*BENCHMARKS, PICTURES):
            raise UserError(f"evaluation: unknown benchmark {benchmark.name!r}; choose from {', '.join(BENCHMARKS)}")
        if not Path(benchmark.data).is_dir():
            raise UserError(f"evaluation: {benchmark.data}: no such folder (benchmark {benchmark.name})")
        benchmark.read()
    if evaluation.vq and not Path(evaluation.vq).is_dir():
        raise UserError(f"evaluation: {evaluation.vq}: no such folder (evaluation.vq)")
    for run in runs:
        for name, overrides in evaluation.evaluate_as.items():
            try:
                _roles(run, overrides)
            except UserError as error:
                raise UserError(f"evaluation.evaluate_as.{name}, run {run.name}: {error}") from None


def fingerprint(run: StudyRun, evaluation: StudyEvaluation) -> dict:
    """What a run's figures depend on besides its configuration, as plain data."""
    selected = benchmarks(run, evaluation)
    return {
        "benchmarks": [[b.name, b.data, _checksum(Path(b.data)), b.parts, *b.options] for b in selected],
        "evaluate_as": evaluation.evaluate_as if selected else {},
        "vq": evaluation.vq if selected else None,
    }


def benchmarks(run: StudyRun, evaluation: StudyEvaluation) -> list[StudyBenchmark]:
    """The benchmarks for the tasks that the run is trained on."""
    return [benchmark for benchmark in evaluation.benchmarks if benchmark.task in run.tasks]


def different_roles(run: StudyRun, evaluation: StudyEvaluation) -> dict[str, list[str]]:
    """``evaluate_as`` without entries that give this run the plan of an earlier entry."""
    different: dict[str, list[str]] = {}
    seen = []
    for name, overrides in evaluation.evaluate_as.items():
        roles = _roles(run, overrides)
        if roles not in seen:
            seen.append(roles)
            different[name] = overrides
    return different


def same_roles(run: StudyRun, evaluation: StudyEvaluation, name: str) -> str:
    """The entry of :func:`different_roles` that gives the run the same plan as ``name``."""
    roles = _roles(run, evaluation.evaluate_as[name])
    return next(n for n, overrides in different_roles(run, evaluation).items() if _roles(run, overrides) == roles)


def answers(run: StudyRun, name: str) -> Path:
    """The folder of the answers for an ``evaluate_as`` entry."""
    return run.folder / "benchmarks" / name


def scores(run: StudyRun, name: str) -> dict[str, float]:
    """The figures for an ``evaluate_as`` entry, as tools/evaluate.py wrote them."""
    rows = read_json(_beside(answers(run, name), ".json"))["rows"]
    return {column: value for row in rows.values() for column, value in row.items()}


def _evaluation(run: StudyRun, evaluation: StudyEvaluation, name: str, overrides: list[str]) -> Step:
    folder = answers(run, name)
    scored, marker = _beside(folder, ".json"), _beside(folder, ".done.json")
    arguments = ["--checkpoint", str(run.folder), "--vq", evaluation.vq, "--out", str(folder), "--set-aside"]
    arguments += ["--tensor", str(run.config.parallel.tensor), "--json", str(scored)]
    for benchmark in benchmarks(run, evaluation):
        arguments += ["--benchmark", benchmark.name, "--data", benchmark.data, "--parts", benchmark.parts]
        arguments += ["--label", run.name, *benchmark.options]
    command = [str(ROOT / "tools" / "evaluate.py"), *arguments, *overrides]
    done = {"command": command[1:], "asked": fingerprint(run, evaluation)["benchmarks"]}

    def finish() -> None:
        for answered in read_json(scored)["files"]:
            if missing := answered["scores"]["missing"]:
                raise UserError(f"{answered['file']}: {missing} of {answered['benchmark']} are missing; see log.txt")
        write_json(marker, done)

    return Step(
        f"evaluation ({name})",
        [*_launcher(run), *command],
        lambda: marker.is_file() and read_json(marker) == done,
        finish,
    )


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(folder.name + suffix)


@functools.cache
def _checksum(folder: Path) -> str:
    """16 hexadecimal digits over the questions of a benchmark, without its pictures.

    The questions are the text files of its folder and of folders up to two levels below.
    """
    checksum = hashlib.sha256()
    for file in sorted(file for depth in ("*", "*/*", "*/*/*") for file in folder.glob(depth)):
        if file.suffix in (".json", ".jsonl", ".txt", ".tsv"):
            checksum.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return checksum.hexdigest()[:16]


def _roles(run: StudyRun, overrides: list[str]) -> tuple:
    config = with_roles(run.config, overrides)
    plan = Plan.from_config(config)
    return plan.roles, plan.projections, plan.dense_share


def _launcher(run: StudyRun) -> list[str]:
    if run.processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(run.processes)]
