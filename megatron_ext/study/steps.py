"""What has to be done for a run, as commands that can each be stopped and given again."""

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
from megatron_ext.study.grid import Run
from megatron_ext.study.study_file import PICTURES, Evaluation

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Step:
    """A command; ``finish`` is called when it has left with 0, ``is_done`` says whether it is done already."""

    name: str
    command: list[str]
    is_done: Callable[[], bool]
    finish: Callable[[], None] = lambda: None


def steps(run: Run, evaluation: Evaluation) -> Iterator[Step]:
    """Training, then an evaluation for each of ``evaluate_as``."""
    train = [str(ROOT / "pretrain_unified.py"), "--config", str(run.folder / "run.yaml")]
    yield Step("training", [*_launcher(run), *train], lambda: state.is_trained(run))
    for name, overrides in different_roles(run, evaluation).items():
        if benchmarks(run, evaluation):
            yield _evaluation(run, evaluation, name, overrides)


def check(runs: Sequence[Run], evaluation: Evaluation) -> None:
    """Refuse before training what evaluation would stumble over after it.

    Raises:
        UserError: a benchmark, folder, part or override that is of no use.
    """
    for benchmark in evaluation.benchmarks:
        if benchmark.name not in (*BENCHMARKS, PICTURES):
            raise UserError(f"evaluation: there is no benchmark {benchmark.name!r}; there are {', '.join(BENCHMARKS)}")
        if not Path(benchmark.data).is_dir():
            raise UserError(f"evaluation: {benchmark.data}: there is no such folder (benchmark {benchmark.name})")
        benchmark.read()
    if evaluation.vq and not Path(evaluation.vq).is_dir():
        raise UserError(f"evaluation: {evaluation.vq}: there is no such folder (evaluation.vq)")
    for run in runs:
        for name, overrides in evaluation.evaluate_as.items():
            try:
                _roles(run, overrides)
            except UserError as error:
                raise UserError(f"evaluation.evaluate_as.{name}, run {run.name}: {error}") from None


def fingerprint(run: Run, evaluation: Evaluation) -> dict:
    """What decides a run's figures beside its configuration, as plain data."""
    asked = benchmarks(run, evaluation)
    return {
        "benchmarks": [[b.name, b.data, _checksum(Path(b.data)), b.parts, *b.options] for b in asked],
        "evaluate_as": evaluation.evaluate_as if asked else {},
        "vq": evaluation.vq if asked else None,
    }


def benchmarks(run: Run, evaluation: Evaluation) -> list:
    """Those for the tasks that the run is trained on."""
    return [benchmark for benchmark in evaluation.benchmarks if benchmark.task in run.tasks]


def different_roles(run: Run, evaluation: Evaluation) -> dict[str, list[str]]:
    """``evaluate_as`` without the entries under which this run's plan is that of an earlier entry."""
    different: dict[str, list[str]] = {}
    seen = []
    for name, overrides in evaluation.evaluate_as.items():
        roles = _roles(run, overrides)
        if roles not in seen:
            seen.append(roles)
            different[name] = overrides
    return different


def same_roles(run: Run, evaluation: Evaluation, name: str) -> str:
    """The entry of :func:`different_roles` under which the run has the plan that it has under ``name``."""
    wanted = _roles(run, evaluation.evaluate_as[name])
    return next(n for n, o in different_roles(run, evaluation).items() if _roles(run, o) == wanted)


def answers(run: Run, name: str) -> Path:
    """The folder with the answers under some roles."""
    return run.folder / "benchmarks" / name


def scores(run: Run, name: str) -> dict[str, float]:
    """The figures under some roles, as tools/evaluate.py wrote them."""
    rows = read_json(_beside(answers(run, name), ".json"))["rows"]
    return {column: value for row in rows.values() for column, value in row.items()}


def _evaluation(run: Run, evaluation: Evaluation, name: str, overrides: list[str]) -> Step:
    folder = answers(run, name)
    scored, marker = _beside(folder, ".json"), _beside(folder, ".done.json")
    words = ["--checkpoint", str(run.folder), "--vq", evaluation.vq, "--out", str(folder), "--set-aside"]
    words += ["--tensor", str(run.config.parallel.tensor), "--json", str(scored)]
    for benchmark in benchmarks(run, evaluation):
        words += ["--benchmark", benchmark.name, "--data", benchmark.data, "--parts", benchmark.parts]
        words += ["--label", run.name, *benchmark.options]
    command = [str(ROOT / "tools" / "evaluate.py"), *words, *overrides]
    done = {"command": command[1:], "asked": fingerprint(run, evaluation)["benchmarks"]}

    def finish() -> None:
        for one in read_json(scored)["files"]:
            if missing := one["scores"]["missing"]:
                raise UserError(f"{one['file']}: {missing} of {one['benchmark']} are missing; log.txt says why")
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
    """16 hexadecimal digits that change with the questions of a benchmark, which lie in text files of its folder or at
    most two folders deeper; pictures are not read."""
    told = hashlib.sha256()
    for file in sorted(file for depth in ("*", "*/*", "*/*/*") for file in folder.glob(depth)):
        if file.suffix in (".json", ".jsonl", ".txt", ".tsv"):
            told.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return told.hexdigest()[:16]


def _roles(run: Run, overrides: list[str]) -> tuple:
    config = with_roles(run.config, overrides)
    plan = Plan.of(config.plan, config.model.num_layers)
    return plan.roles, plan.projections, plan.dense_share


def _launcher(run: Run) -> list[str]:
    if run.processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(run.processes)]
