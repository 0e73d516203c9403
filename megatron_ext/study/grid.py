"""The runs of a study: sizes x methods x budgets x seeds, each with its whole configuration."""

import dataclasses
import difflib
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from megatron_ext import config_file
from megatron_ext.command_line import progress
from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.evaluation.validation import validate_evaluation
from megatron_ext.files import read_json, write_json
from megatron_ext.study.budget import Length, Lengths
from megatron_ext.study.study_file import Method, Size, Study
from megatron_ext.training.validation import validate


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        name: of its folder under ``OUT/runs/``.
        budgets: those it belongs to; a method that costs what dense costs is run once for both.
        length: what its number of iterations was planned from.
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

    @property
    def iterations(self) -> int:
        return self.config.training.iterations

    @property
    def tasks(self) -> tuple[str, ...]:
        task = self.method.trained_on
        return ("understanding", "generation") if task == "unified" else (task,)


def runs(study: Study) -> list[Run]:
    """All runs, smallest size first as the file has them, budgets as the study has them.

    What is measured of the data is kept in ``OUT/plan.json``, so that it is measured once.

    Raises:
        UserError: a configuration is refused; the run is named.
    """
    made = []
    pairs = [(size, method) for size in study.sizes for method in study.methods_of(size)]
    lengths = _lengths(study, pairs)
    for (size, method), length in zip(pairs, lengths):
        planned: dict[tuple[int, int], list[str]] = {}
        base = _config(study, size, method)
        for budget in study.budgets_of(size, method):
            iterations = length.iterations(base.training.iterations, budget)
            batch = length.batch(base.training.global_batch_size, budget, _replicas(size, base))
            planned.setdefault((iterations, batch), []).append(budget)
        for (iterations, batch), budgets in planned.items():
            for seed in study.seeds_of(size):
                made.append(_run(study, size, method, tuple(budgets), iterations, batch, seed, length))
    return made


def _run(
    study: Study,
    size: Size,
    method: Method,
    budgets: tuple[str, ...],
    iterations: int,
    batch: int,
    seed: int,
    length: Length,
) -> Run:
    name = f"{size.name}.{method.name}.{budgets[0]}.seed{seed}"
    folder = Path(study.output) / "runs" / name
    config = _config(study, size, method)
    config.output = str(folder)
    # A run of another length gives the same share of it to the decay; warm-up stays as many steps.
    decay = config.optimizer.wsd_decay_iterations
    config.optimizer.wsd_decay_iterations = round(decay * iterations / config.training.iterations)
    config.training.iterations = iterations
    # Validation is counted in batches, and is to have the same rows.
    rows = config.training.validation_batches * config.training.global_batch_size
    config.training.validation_batches = -(-rows // batch)
    config.training.global_batch_size = batch
    config.training.micro_batch_size = math.gcd(config.training.micro_batch_size, batch // _replicas(size, config))
    config.training.seed = config.data.seed = seed
    config.training.validation_interval = config.training.validation_interval or iterations
    processes = _processes(size, config)
    try:
        validate(config, processes)
        validate_evaluation(config)
    except UserError as error:
        raise UserError(f"run {name}: {str(error).removeprefix('config: ')}") from None
    return Run(name, folder, size, method, budgets, seed, processes, length, config)


def _processes(size: Size, config: Config) -> int:
    return size.processes or config.parallel.tensor * config.parallel.pipeline


def _replicas(size: Size, config: Config) -> int:
    return max(1, _processes(size, config) // (config.parallel.tensor * config.parallel.pipeline))


def _config(study: Study, size: Size, method: Method, all_sources: bool = False) -> Config:
    """The configuration of a size and method, with the sources that the method is trained on.

    Validation keeps all sources, so that the rows it measures are the same for every run.
    """
    trees = [*map(config_file.read_yaml, study.base), study.settings, size.settings, method.settings]
    config = config_file.from_trees(Config, trees)
    if method.trained_on != "unified" and not all_sources:
        kept = {method.trained_on} | ({"text"} if study.keep_text else set())
        config.data.train = [source for source in config.data.train if source.task in kept]
        if not any(source.task == method.trained_on for source in config.data.train):
            raise UserError(f"method {method.name}: 'data.train' has no source for the task {method.trained_on}")
    return config


def _lengths(study: Study, pairs: list[tuple[Size, Method]]) -> list[Length]:
    """Of each size and method, in order."""
    configs = [(_config(study, *pair), _config(study, *pair, all_sources=True)) for pair in pairs]
    cards = {source.path: metadata_checksum(source.path) for _, whole in configs for source in whole.data.train}
    told = json.dumps([[config_file.to_tree(c) for pair in configs for c in pair], cards], sort_keys=True)
    key = hashlib.sha256(told.encode()).hexdigest()
    file = Path(study.output) / "plan.json"
    if file.is_file() and (kept := read_json(file))["key"] == key:
        return [Length(**length) for length in kept["lengths"]]
    measure = Lengths().measure
    lengths = [measure(*pair) for pair in progress(configs, desc="planning", leave=False)]
    write_json(file, {"key": key, "lengths": [dataclasses.asdict(length) for length in lengths]})
    return lengths


def metadata_checksum(path: str) -> str | None:
    """Of a data set's metadata, which has the checksums of its files; None: it is not there."""
    metadata = Path(f"{path}.json")
    return hashlib.sha256(metadata.read_bytes()).hexdigest() if metadata.is_file() else None


def chosen(runs: list[Run], names: list[str] | None) -> list[Run]:
    """The runs of these names; None: all.

    Raises:
        UserError: there is no run of a name.
    """
    known = {run.name: run for run in runs}
    for name in names or ():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise UserError(f"--run {name}: there is no such run" + (f"; did you mean {close[0]}?" if close else ""))
    return runs if names is None else [known[name] for name in names]
