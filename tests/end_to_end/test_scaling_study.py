"""A study as a user runs it: killed and started again, evaluated, reported on."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_ext.analysis import results
from megatron_ext.study import grid, state, steps, study_file
from megatron_ext.training.metrics import read_metrics
from support.programs import run_program, start_program, wait_until
from support.studies import write_study


@pytest.fixture
def study(tmp_path) -> Path:
    """A study of two equal runs; only the first has a trial, and answers the benchmark, as trained and blind."""
    return write_study(tmp_path)


def test_a_killed_study_ends_as_if_it_had_not_been(study):
    command = [sys.executable, "tools/scaling_study.py", str(study)]
    output = study.parent / "out"
    first = output / "runs" / "tiny.first.tokens.seed1"
    killed = start_program(command, stdout=subprocess.DEVNULL)
    wait_until(lambda: (first / "checkpoints" / "iter_0000005").is_dir(), killed)
    (training,) = (p for p in psutil.Process(killed.pid).children() if "pretrain_unified.py" in " ".join(p.cmdline()))
    killed.send_signal(signal.SIGKILL)
    killed.wait(timeout=60)
    runs = {run.method.name: run for run in grid.runs(study_file.read(study))}
    assert state.locked(runs["first"])  # its program is still at work
    training.kill()
    wait_until(lambda: not state.locked(runs["first"]))
    assert not (first / "FINISHED").exists()

    run_program([*command, "--fork"], timeout=500)
    assert "resumed from" in (first / "log.txt").read_text()
    trained = [
        [{k: r[k] for k in r if k.startswith(("iteration", "loss", "grad_norm", "validation"))} for r in records]
        for records in (read_metrics(runs[name].folder / "metrics.jsonl") for name in ("first", "second"))
    ]
    assert trained[0] == trained[1] and len(trained[0]) == 30

    assert "- 2 of 2 runs are complete" in (output / "report.md").read_text()
    (trial,) = (output / "learning_rates").iterdir()
    assert trial.name == "tiny.first.lr0.0003.seed9" and (trial / "result.json").is_file()
    rows = {(row.method, row.evaluated_as): row for row in results.read(output / "results.json").rows}
    assert rows.keys() == {("first", None), ("first", "blind"), ("first", "none_drawn"), ("second", None)}
    trained, blind, same, second = rows.values()
    assert same.metrics == pytest.approx(trained.metrics, rel=1e-6)  # its losses are computed after training
    assert trained.metrics["understanding loss"] == second.metrics["understanding loss"]
    assert trained.metrics["understanding loss"] != blind.metrics["understanding loss"]
    assert "POPE-F1" in trained.metrics and "POPE-F1" in blind.metrics and "POPE-F1" not in second.metrics
    assert trained.flops == pytest.approx(sum(r["flops"] for r in read_metrics(first / "metrics.jsonl")))
    evaluation = study_file.read(study).evaluation
    assert all(step.is_done() for step in steps.steps(runs["first"], evaluation))
