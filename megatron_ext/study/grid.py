"""The runs of a study: sizes x methods x budgets x seeds, each with its whole configuration."""

import dataclasses
import difflib
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_ext import config_file
from megatron_ext.command_line import progress
from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.evaluation.config_checks import validate_evaluation
from megatron_ext.files import read_json, write_json
from megatron_ext.study.budget import Length, Lengths
from megatron_ext.study.study_file import Method, Size, Study
from megatron_ext.training.config_checks import validate


@dataclass(frozen=True)
class StudyRun:
    """One training run.

    Attributes:
        name: the name of its folder under ``OUT/runs/``.
        budgets: the budgets it belongs to; runs that two budgets have in common are trained once.
        length: the measurements that its number of iterations follows from.
        is_trial: it tries a learning rate, and answers no benchmark.
    """

    name: str
    folder: Path
    size: Size
    method: Method
    budgets: tuple[str, ...]
    seed: int
    processes: int
    length: Length
    config: Config
    is_trial: bool = False

    @property
    def iterations(self) -> int:
        return self.config.training.iterations

    @property
    def tasks(self) -> tuple[str, ...]:
        task = self.method.trained_on
        return ("understanding", "generation") if task == "unified" else (task,)


def runs(study: Study, rates: Mapping[tuple[str, str], float] | None = None) -> list[StudyRun]:
    """All runs: sizes in the order of the file, budgets in the order of the study.

    Keeps the measurements on the data in ``OUT/plan.json``, so that they are made once.

    Args:
        rates: (size, method) -> learning rate, instead of the configuration's.

    Raises:
        UserError: the configuration of a run is refused; the run is named.
    """
    study_runs = []
    for size, method, length in lengths(study):
        planned: dict[tuple[int, int], list[str]] = {}
        for budget in study.budgets_of(size, method):
            planned.setdefault(_iterations_and_batch(study, size, method, length, budget), []).append(budget)
        rate = (rates or {}).get((size.name, method.name))
        for budgets in planned.values():
            for seed in study.seeds_of(size, method):
                name = f"runs/{size.name}.{method.name}.{budgets[0]}.seed{seed}"
                study_runs.append(build(study, name, size, method, length, tuple(budgets), seed, rate))
    return study_runs


def build(
    study: Study,
    name: str,
    size: Size,
    method: Method,
    length: Length,
    budgets: tuple[str, ...],
    seed: int,
    rate: float | None = None,
    is_trial: bool = False,
) -> StudyRun:
    """One run, in the folder ``OUT/NAME``.

    Args:
        budgets: those that it belongs to; all give it the same length.
        rate: learning rate; None: the configuration's.
        is_trial: its length follows from ``learning_rates.iterations``.

    Raises:
        UserError: its configuration is refused; the run is named.
    """
    dense_iterations = study.learning_rates.iterations if is_trial else None
    iterations, batch = _iterations_and_batch(study, size, method, length, budgets[0], dense_iterations)
    folder = Path(study.output) / name
    config = _config(study, size, method)
    config.output = str(folder)
    if rate is not None:
        config.optimizer.min_lr *= rate / config.optimizer.lr
        config.optimizer.lr = rate
    # The decay takes the same fraction of every run; warm-up takes the same number of steps.
    decay = config.optimizer.wsd_decay_iterations
    config.optimizer.wsd_decay_iterations = round(decay * iterations / config.training.iterations)
    config.training.iterations = iterations
    # Validation is counted in batches, and must cover the same rows whatever the batch.
    rows = config.training.validation_batches * config.training.global_batch_size
    config.training.validation_batches = -(-rows // batch)
    config.training.global_batch_size = batch
    rows = batch // _replicas(size, config)
    most = config.training.micro_batch_size
    config.training.micro_batch_size = rows if rows <= most else math.gcd(most, rows)
    config.training.seed = config.data.seed = seed
    config.training.validation_interval = config.training.validation_interval or iterations
    processes = _processes(size, config)
    try:
        validate(config, processes)
        validate_evaluation(config)
    except UserError as error:
        raise UserError(f"run {folder.name}: {str(error).removeprefix('config: ')}") from None
    return StudyRun(folder.name, folder, size, method, budgets, seed, processes, length, config, is_trial)


def _iterations_and_batch(
    study: Study, size: Size, method: Method, length: Length, budget: str, dense_iterations: int | None = None
) -> tuple[int, int]:
    """Iterations of a run, and the rows of its global batch."""
    config = _config(study, size, method)
    iterations = length.iterations(dense_iterations or config.training.iterations, budget)
    return iterations, length.batch(config.training.global_batch_size, budget, _replicas(size, config))


def _processes(size: Size, config: Config) -> int:
    return size.processes or config.parallel.tensor * config.parallel.pipeline


def _replicas(size: Size, config: Config) -> int:
    return max(1, _processes(size, config) // (config.parallel.tensor * config.parallel.pipeline))


def _config(study: Study, size: Size, method: Method, all_sources: bool = False) -> Config:
    """The configuration of a size and method, with the sources of the method's tasks.

    Validation keeps all sources, so that every run is validated on the same rows.
    """
    trees = [*map(config_file.read_yaml, study.base), study.settings, size.settings, method.settings]
    config = config_file.from_trees(Config, trees)
    if method.trained_on != "unified" and not all_sources:
        if any(source.task == "interleaved" for source in config.data.train):
            raise UserError(
                f"method {method.name}: 'data.train' has interleaved documents, which only the unified runs would see; "
                "leave them out of a study of single tasks"
            )
        kept = {method.trained_on} | ({"text"} if study.keep_text else set())
        config.data.train = [source for source in config.data.train if source.task in kept]
        if not any(source.task == method.trained_on for source in config.data.train):
            raise UserError(f"method {method.name}: 'data.train' has no source for the task {method.trained_on}")
    return config


def lengths(study: Study) -> list[tuple[Size, Method, Length]]:
    """Every size with each of its methods, and the length of their runs; measured once, kept in ``OUT/plan.json``."""
    pairs = [(size, method) for size in study.sizes for method in study.methods_of(size)]
    configs = [(_config(study, *pair), _config(study, *pair, all_sources=True)) for pair in pairs]
    checksums = {source.path: metadata_checksum(source.path) for _, whole in configs for source in whole.data.train}
    names = [field.name for field in dataclasses.fields(Length)]
    measured_on = [[config_file.to_tree(c) for pair in configs for c in pair], checksums, names]
    key = hashlib.sha256(json.dumps(measured_on, sort_keys=True).encode()).hexdigest()
    file = Path(study.output) / "plan.json"
    if file.is_file() and (kept := read_json(file))["key"] == key:
        lengths = [Length(**length) for length in kept["lengths"]]
    else:
        measure = Lengths().measure
        lengths = [measure(*pair) for pair in progress(configs, desc="planning", leave=False)]
        write_json(file, {"key": key, "lengths": [dataclasses.asdict(length) for length in lengths]})
    return [(*pair, length) for pair, length in zip(pairs, lengths)]


def metadata_checksum(path: str) -> str | None:
    """The checksum of a data set's metadata, which holds the checksums of its files; None if the file is missing."""
    metadata = Path(f"{path}.json")
    return hashlib.sha256(metadata.read_bytes()).hexdigest() if metadata.is_file() else None


def select(runs: list[StudyRun], names: list[str] | None) -> list[StudyRun]:
    """The runs with the given names; all runs for None.

    Raises:
        UserError: no run has one of the names.
    """
    known = {run.name: run for run in runs}
    for name in names or ():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise UserError(f"--run {name}: no such run" + (f"; did you mean {close[0]}?" if close else ""))
    return runs if names is None else [known[name] for name in names]
