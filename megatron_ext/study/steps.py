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
from megatron_ext.token_classes import Modality, Task

ROOT = Path(__file__).parents[2]

LOSS = "validation_loss_"
"""The beginning of a task's validation loss in metrics."""


@dataclass(frozen=True)
class Step:
    """A command; ``finish`` is called after it exited with 0, ``is_done`` tells whether the step is done."""

    name: str
    command: list[str]
    is_done: Callable[[], bool]
    finish: Callable[[], None] = lambda: None


def steps(run: StudyRun, evaluation: StudyEvaluation) -> Iterator[Step]:
    """Training, then an evaluation for each set of roles, and the validation losses of those not trained with."""
    train = [str(ROOT / "pretrain_unified.py"), "--config", str(run.folder / "run.yaml")]
    yield Step("training", [*_launcher(run), *train], lambda: state.is_trained(run))
    for name in roles_of(run, evaluation):
        if asked := [b for b in benchmarks(run, evaluation) if asked_as(run, evaluation, name, b) == name]:
            yield _evaluation(run, evaluation, name, asked)
    if untrained_roles(run, evaluation):
        yield _losses(run, evaluation)


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
        for name, overrides in roles_of(run, evaluation).items():
            try:
                _roles(run, overrides)
            except UserError as error:
                raise UserError(f"evaluate_as.{name}, run {run.name}: {error}") from None


def fingerprint(run: StudyRun, evaluation: StudyEvaluation) -> dict:
    """What a run's figures depend on besides its configuration, as plain data."""
    selected = benchmarks(run, evaluation)
    return {
        "benchmarks": _identities(selected),
        "evaluate_as": roles_of(run, evaluation) if selected or len(roles_of(run, evaluation)) > 1 else {},
        "vq": evaluation.vq if selected else None,
    }


def benchmarks(run: StudyRun, evaluation: StudyEvaluation) -> list[StudyBenchmark]:
    """The benchmarks for the tasks that the run is trained on."""
    return [] if run.is_trial else [benchmark for benchmark in evaluation.benchmarks if benchmark.task in run.tasks]


def roles_of(run: StudyRun, evaluation: StudyEvaluation) -> dict[str, list[str]]:
    """Name -> overrides of every set of roles that the run is evaluated with."""
    return {"trained": []} if run.is_trial else evaluation.roles_of(run.method)


def asked_as(run: StudyRun, evaluation: StudyEvaluation, name: str, benchmark: StudyBenchmark) -> str:
    """The first entry of ``evaluate_as`` that gives the documents of a benchmark the roles that ``name`` does: its
    figures are those of ``name``."""
    task = Task.GENERATION if benchmark.name == PICTURES else Task.UNDERSTANDING
    roles = roles_of(run, evaluation)
    wanted = _roles(run, roles[name], task)
    return next(other for other, overrides in roles.items() if _roles(run, overrides, task) == wanted)


def untrained_roles(run: StudyRun, evaluation: StudyEvaluation) -> dict[str, list[str]]:
    """The entries of ``evaluate_as`` under which validation losses are not those of training."""
    if not run.config.data.validation:
        return {}
    trained = _roles(run, [])
    return {name: changes for name, changes in roles_of(run, evaluation).items() if _roles(run, changes) != trained}


def answers(run: StudyRun, name: str) -> Path:
    """The folder of the answers for an ``evaluate_as`` entry."""
    return run.folder / "benchmarks" / name


def scores(run: StudyRun, evaluation: StudyEvaluation, name: str) -> dict[str, float]:
    """The benchmarks' figures for an ``evaluate_as`` entry, as tools/evaluate.py wrote them."""
    figures = {}
    for benchmark in benchmarks(run, evaluation):
        folder = answers(run, asked_as(run, evaluation, name, benchmark))
        for answered in read_json(_beside(folder, ".json"))["files"]:
            if Path(answered["file"]).stem == benchmark.name:
                figures |= answered["scores"]["headline"]
    return figures


def losses(run: StudyRun, evaluation: StudyEvaluation, name: str) -> dict[str, float]:
    """The validation losses for an ``evaluate_as`` entry; empty where they are those of training."""
    if name not in untrained_roles(run, evaluation):
        return {}
    validated = read_json(_losses_file(run))[name]
    return {f"{task} loss": validated[LOSS + task] for task in run.tasks if LOSS + task in validated}


def _evaluation(run: StudyRun, evaluation: StudyEvaluation, name: str, asked: list[StudyBenchmark]) -> Step:
    folder = answers(run, name)
    scored, marker = _beside(folder, ".json"), _beside(folder, ".done.json")
    arguments = ["--checkpoint", str(run.folder), "--vq", evaluation.vq, "--out", str(folder), "--set-aside"]
    arguments += ["--tensor", str(run.config.parallel.tensor), "--json", str(scored)]
    for benchmark in asked:
        arguments += ["--benchmark", benchmark.name, "--data", benchmark.data, "--parts", benchmark.parts]
        arguments += ["--label", run.name, *benchmark.options]
    command = [str(ROOT / "tools" / "evaluate.py"), *arguments, *roles_of(run, evaluation)[name]]
    done = {"command": command[1:], "asked": _identities(asked)}

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


def _losses(run: StudyRun, evaluation: StudyEvaluation) -> Step:
    file = _losses_file(run)
    marker = _beside(file.with_suffix(""), ".done.json")
    command = [str(ROOT / "tools" / "validation_losses.py"), "--checkpoint", str(run.folder), "--json", str(file)]
    command += ["--tensor", str(run.config.parallel.tensor)]
    for name, overrides in untrained_roles(run, evaluation).items():
        command += ["--roles", name, *overrides]
    return Step(
        "validation losses",
        [*_launcher(run), *command],
        lambda: marker.is_file() and read_json(marker) == command[1:],
        lambda: write_json(marker, command[1:]),
    )


def _losses_file(run: StudyRun) -> Path:
    return run.folder / "benchmarks" / "validation_losses.json"


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


def _identities(asked: Sequence[StudyBenchmark]) -> list[list]:
    return [[b.name, b.data, _checksum(Path(b.data)), b.parts, *b.options] for b in asked]


def _roles(run: StudyRun, overrides: Sequence[str], task: Task | None = None) -> tuple:
    """What overrides make of the run's plan, for the documents of one task, or of all."""
    plan = Plan.from_config(with_roles(run.config, overrides))
    tasks = Task if task is None else [task]
    roles = [[plan.role(layer, t, m) for t in tasks for m in Modality] for layer in range(plan.num_layers)]
    return roles, plan.projections, plan.dense_share


def _launcher(run: StudyRun) -> list[str]:
    if run.processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(run.processes)]
