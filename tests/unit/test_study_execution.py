"""Scheduling of runs: failures, refusals, several at once, signals, final figures."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.study import scheduler, state, status, steps
from megatron_ext.study.budget import Length
from megatron_ext.study.grid import StudyRun
from megatron_ext.study.study_file import Method, Size, Study, StudyEvaluation

RECORD = {
    "consumed_tokens": 9,
    "consumed_flops": 400.0,
    "consumed_dense_flops": 800.0,
    "validation_loss_generation": 1.5,
}
TRAINS = f"echo '{json.dumps({'iteration': 100} | RECORD)}' > metrics.jsonl; echo '{{\"iteration\": 100}}' > FINISHED"


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A function (scripts by name) that gives runs whose training is that shell script, in the run's folder."""

    def make(**scripts: str) -> tuple[Study, list[StudyRun]]:
        methods = [Method(name, "generation", "a") for name in scripts]
        study = Study("test", str(tmp_path), ["base.yaml"], [Size("s", {})], methods)
        length = Length(1.0, 1.0, 1.0, 10)
        runs = [
            StudyRun(m.name, tmp_path / m.name, study.sizes[0], m, ("tokens",), 1, 1, length, Config()) for m in methods
        ]

        def training(run: StudyRun, evaluation: StudyEvaluation):
            command = ["sh", "-c", f"cd {run.folder}; {scripts[run.name]}"]
            yield steps.Step("training", command, lambda: state.is_trained(run))

        monkeypatch.setattr(steps, "steps", training)
        return study, runs

    return make


def test_a_failed_run_is_named_with_its_last_line_and_the_others_run(study, capsys):
    test_study, runs = study(a=TRAINS, b="echo fine; echo 'disk: no room' >&2; exit 3", c=TRAINS)
    scheduler.execute(runs, test_study.evaluation)
    assert status.failed(test_study, runs) == ["b"]
    table, counts = status.table(test_study, runs)
    assert table["state"].tolist() == ["finished", "failed", "finished"] and counts == "2 finished, 1 failed"
    assert table["note"][1] == "training: disk: no room"
    assert "[2/3] b: FAILED in training: disk: no room" in capsys.readouterr().out
    result = json.loads((runs[0].folder / "result.json").read_text())
    assert (result["flops"], result["flops_ratio"]) == (400.0, 0.5)
    assert result["losses"] == {"generation loss": 1.5}


def test_failed_and_stopped_runs_are_tried_again_and_finished_ones_are_not(study, capsys):
    flaky = f"echo x >> tries; [ $(wc -l < tries) = 1 ] && exit 1; {TRAINS}"
    test_study, runs = study(a=f"echo x >> tries; {TRAINS}", b=flaky, c="echo stopped early")
    scheduler.execute(runs, test_study.evaluation)
    assert "c: stopped in training at iteration 0" in capsys.readouterr().out
    scheduler.execute(runs, test_study.evaluation)
    assert [(run.folder / "tries").read_text() for run in runs[:2]] == ["x\n", "x\nx\n"]
    assert status.failed(test_study, runs) == [] and status.unfinished(test_study, runs) == [runs[2]]


def test_figures_that_are_missing_make_a_run_fail(study):
    lacks = TRAINS.replace('"consumed_flops": 400.0, ', "")
    test_study, runs = study(a=TRAINS.replace('"iteration": 100, ', '"iteration": 99, '), b=lacks, c=TRAINS)
    scheduler.execute(runs, test_study.evaluation)
    assert "metrics.jsonl: does not end with iteration 100" in state.of(runs[0], {}).note
    assert "metrics.jsonl: has no consumed_flops" in state.of(runs[1], {}).note
    assert (runs[2].folder / "result.json").is_file()


def test_a_study_waits_for_a_run_of_another_process(study, capsys):
    test_study, (run,) = study(a=TRAINS)
    descriptor = state.lock(run)
    threading.Timer(0.5, os.close, [descriptor]).start()
    scheduler.execute([run], test_study.evaluation)
    assert capsys.readouterr().out.count("waiting for a: another process works on it") == 1
    assert (run.folder / "result.json").is_file()


def test_runs_go_side_by_side(study):
    meets = "touch ../{0}.at_work; for i in $(seq 600); do [ -f ../{1}.at_work ] && break; sleep 0.1; done; "
    meets += "[ -f ../{1}.at_work ] && {2}"
    test_study, runs = study(a=meets.format("a", "b", TRAINS), b=meets.format("b", "a", TRAINS))
    scheduler.execute(runs, test_study.evaluation, jobs=2)
    assert not status.unfinished(test_study, runs)


def test_gpus_are_shared_out(study):
    shown = f"echo $CUDA_VISIBLE_DEVICES > gpus; {TRAINS}"
    test_study, runs = study(a=shown, b=shown)
    scheduler.execute(runs, test_study.evaluation, jobs=2, gpus=["4"])
    assert [(run.folder / "gpus").read_text() for run in runs] == ["4\n", "4\n"]


def test_a_signal_is_passed_to_the_runs_and_no_new_run_starts(study):
    waits = "trap 'echo saved > saved; exit 0' TERM; touch at_work; for i in $(seq 600); do sleep 0.1; done"
    test_study, runs = study(a=waits, b=TRAINS)
    started: Path = runs[0].folder / "at_work"

    def stop():
        while not started.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(UserError, match="stopped by SIGTERM; the same command resumes the study"):
        scheduler.execute(runs, test_study.evaluation)
    assert (runs[0].folder / "saved").exists() and not runs[1].folder.exists()
    assert state.of(runs[0], {}).kind == "waiting"  # nothing was trained yet, and nothing failed
