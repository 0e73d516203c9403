"""The losses of role tables with one model: the change of loss for each entry of a table, and for whole tables.

All tables are measured on the same rows of the validation data, in the same order, and nothing is random. Losses are
kept in ``OUT/measured.json`` as they come, so a search that is stopped goes on with the next table.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_ext.command_line import progress
from megatron_ext.errors import UserError
from megatron_ext.files import read_json, write_json
from megatron_ext.role_search.space import Change, Space, key
from megatron_ext.routing.drawn_tables import Table
from megatron_ext.token_classes import Task

BATCH_ROWS = 4
"""Rows of a batch; standard errors are over batches."""
TASKS = (Task.UNDERSTANDING, Task.GENERATION)


@dataclass(frozen=True)
class Losses:
    """Cross-entropies of both tasks, in nats: their sums, and the number of tokens, in each batch."""

    sums: dict[str, list[float]]
    tokens: dict[str, list[float]]

    def log_ratio(self, base: "Losses") -> dict[str, tuple[float, float]]:
        """For each task ln(loss / loss of ``base``), and its standard error over batches (jackknife)."""
        return {task: _log_ratio(own, base.sums[task], self.tokens[task]) for task, own in self.sums.items()}

    def worse(self, base: "Losses") -> float:
        """The larger of both tasks' log ratios, by which whole tables are ordered."""
        return max(change for change, _ in self.log_ratio(base).values())


def _log_ratio(sums: list[float], base: list[float], tokens: list[float]) -> tuple[float, float]:
    """ln of a ratio of means, over the same tokens, and its jackknife standard error."""
    whole = math.log(sum(sums) / sum(base))
    left_out = []
    if sum(n > 0 for n in tokens) > 1:
        left_out = [math.log((sum(sums) - own) / (sum(base) - other)) for own, other in zip(sums, base)]
    n = len(left_out)
    if n < 2:
        return whole, math.nan
    mean = sum(left_out) / n
    return whole, math.sqrt((n - 1) / n * sum((value - mean) ** 2 for value in left_out))


def tables_to_measure(space: Space) -> dict[str, Table]:
    """The table without changes, and those with a single one, by their keys."""
    tables = [space.own, *(space.changed(change) for change in space.single_changes())]
    return {key(table): table for table in tables}


def single_changes(space: Space, losses: Mapping[str, Losses]) -> dict[Change, Losses]:
    """The losses of each single change."""
    return {change: losses[key(space.changed(change))] for change in space.single_changes()}


def missing(file: Path, tables: Mapping[str, Table]) -> list[str]:
    """The keys of the tables that are not measured yet."""
    known = read_json(file)["tables"] if file.is_file() else {}
    return [name for name in tables if name not in known]


def measured(file: Path, tables: Mapping[str, Table]) -> dict[str, Losses]:
    """The losses of tables that were measured."""
    known = read_json(file)["tables"]
    return {name: Losses(**known[name]) for name in tables}


def measure(file: Path, space: Space, run: Path, rows: int, tables: Mapping[str, Table]) -> None:
    """Measure the tables that are not in ``file`` yet.

    Args:
        run: the folder of the model's run.
        rows: rows of the validation data.

    Raises:
        UserError: the model or its data cannot be read, or ``file`` has losses on other rows.
    """
    left = missing(file, tables)
    known = read_json(file) if file.is_file() else {"rows": rows, "tables": {}}
    if known["rows"] != rows:
        raise UserError(f"{file}: has losses on {known['rows']} rows, 'drawn.rows' is {rows}; remove the file")
    if not left:
        return
    # Imported late: they load Megatron-Core.
    from megatron_ext import distributed
    from megatron_ext.analysis.batches import run_batches
    from megatron_ext.generation import checkpoint
    from megatron_ext.training.prepare import prepare
    from megatron_ext.training.step import evaluate_step, evaluation_mode

    trained = checkpoint.load(run, [], tensor=1)
    batches = list(run_batches(trained.config, trained.vocabulary, "validation", BATCH_ROWS, -(-rows // BATCH_ROWS)))
    with evaluation_mode(trained.chunks):
        for name in progress(left, desc="measuring", unit=" tables"):
            resolved = replace(trained.resolved, plan=space.plan_of(tables[name]))
            sums = {task.name.lower(): [] for task in TASKS}
            tokens = {task.name.lower(): [] for task in TASKS}
            for batch in batches:
                step = prepare(batch, resolved, distributed.device())
                of_batch, counts = evaluate_step(trained.chunks, step, trained.config)
                for task in TASKS:
                    sums[task.name.lower()].append(float(of_batch.flatten()[task]))
                    tokens[task.name.lower()].append(float(counts[task]))
            if absent := [task for task, numbers in tokens.items() if not sum(numbers)]:
                raise UserError(f"config: 'data.validation' has no tokens to predict of {absent[0]}; add such a source")
            known["tables"][name] = {"sums": sums, "tokens": tokens}
            write_json(file, known)
    distributed.shut_down()
