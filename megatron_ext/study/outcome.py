"""The figures of one finished run, from the files of training and evaluation."""

from megatron_ext.errors import UserError
from megatron_ext.files import write_json
from megatron_ext.study import steps
from megatron_ext.study.grid import StudyRun
from megatron_ext.study.study_file import StudyEvaluation
from megatron_ext.training.metrics import read_metrics

LOSS = "validation_loss_"


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
        "tokens": last["consumed_tokens"],
        "flops": last["consumed_flops"],
        "flops_ratio": last["consumed_flops"] / last["consumed_dense_flops"],
        "losses": {f"{task} loss": last[LOSS + task] for task in run.tasks if last.get(LOSS + task) is not None},
        "evaluated": {name: _scores(run, evaluation, name) for name in evaluation.evaluate_as},
        "evaluation": steps.fingerprint(run, evaluation),
    }
    write_json(run.folder / "result.json", result)
    (run.folder / "failed.json").unlink(missing_ok=True)
    return result


def _scores(run: StudyRun, evaluation: StudyEvaluation, name: str) -> dict[str, float]:
    if not steps.benchmarks(run, evaluation):
        return {}
    return steps.scores(run, steps.same_roles(run, evaluation, name))
