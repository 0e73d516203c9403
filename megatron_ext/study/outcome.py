"""The figures of one finished run, from the files of training and evaluation."""

import math

from megatron_ext.errors import UserError
from megatron_ext.files import write_json
from megatron_ext.study import steps
from megatron_ext.study.grid import StudyRun
from megatron_ext.study.study_file import StudyEvaluation
from megatron_ext.training.metrics import read_metrics


def write(run: StudyRun, evaluation: StudyEvaluation) -> dict:
    """Collect the figures and write ``RUN/result.json``, which completes the run.

    Raises:
        UserError: the last iteration was not logged, or lacks a figure.
    """
    file = run.folder / "metrics.jsonl"
    records = read_metrics(file)
    if not records or records[-1]["iteration"] != run.iterations:
        raise UserError(f"{file}: does not end with iteration {run.iterations}")
    last = records[-1]
    if absent := {"consumed_tokens", "consumed_flops", "consumed_dense_flops"} - last.keys():
        raise UserError(f"{file}: has no {min(absent)}; remove the run's folder to train it again")
    result = {
        "iterations": run.iterations,
        "learning_rate": run.config.optimizer.lr,
        "tokens": last["consumed_tokens"],
        "flops": last["consumed_flops"],
        "flops_ratio": last["consumed_flops"] / (last["consumed_dense_flops"] * run.length.lossless_ratio),
        "losses": {f"{task} loss": _figure(last[key]) for task in run.tasks if (key := steps.LOSS + task) in last},
        "evaluated": {
            name: steps.scores(run, evaluation, name) | steps.losses(run, evaluation, name)
            for name in steps.roles_of(run, evaluation)
        },
        "evaluation": steps.fingerprint(run, evaluation),
    }
    write_json(run.folder / "result.json", result)
    (run.folder / "failed.json").unlink(missing_ok=True)
    return result


def _figure(logged: float | None) -> float:
    """NaN for null, which metrics have in place of numbers that are not finite."""
    return math.nan if logged is None else logged
