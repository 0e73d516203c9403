"""Jobs under a real Slurm of one node: the launch script, preprocessing as an array, and a study.

All jobs are submitted first, so that they run while the slowest one waits for its time limit.
"""

import json
import os
import re
import subprocess
import sys
from datetime import datetime

import pytest
from one_machine import SLOWER

from megatron_ext.training.metrics import read_metrics
from support.images import caption_tar
from support.programs import ROOT
from support.studies import write_study
from support.tiny_vq import make_vq
from support.vocabularies import make_vocabulary

pytestmark = pytest.mark.slurm
ITERATIONS = str(70 * SLOWER)
REQUEUED = "goes back into the queue"
HIGH = "--partition=high"
"""Jobs there are not preempted."""


@pytest.fixture(scope="module")
def jobs(slurm) -> dict:
    """The jobs that all tests look at."""
    limited = ("--cpus-per-task=8", f"--time={2 * SLOWER}", f"--signal=B:USR1@{60 * SLOWER}")
    jobs = {
        "disturbed": slurm.train("disturbed", *limited, ITERATIONS=ITERATIONS, STEP_SECONDS="1"),
        "early": slurm.train("early", HIGH, "--cpus-per-task=1", ITERATIONS="9"),
        "refused": slurm.train("refused", HIGH, "--cpus-per-task=1", overrides=("model.num_layers=0",), ranks=1),
    }
    jobs["early"].wait_for(lambda: "start 1" in jobs["early"].text())
    subprocess.run(["scancel", "--batch", "--signal=USR1", jobs["early"].number], check=True)
    quick = ("--cpus-per-task=1", "--time=20")
    jobs["undisturbed"] = slurm.train("undisturbed", HIGH, *quick, ITERATIONS=ITERATIONS, STEP_SECONDS="0")
    return jobs


def test_a_signal_before_training_begins_is_not_lost(slurm, jobs):
    job = jobs["early"]
    job.wait_for(lambda: REQUEUED in job.text() and job.field("Restarts") == "1")
    subprocess.run(["scancel", job.number], check=True)
    assert re.search("stopped before training began|stopped after iteration 0", job.text())
    assert "checkpoint of iteration" not in job.text() and "Traceback" not in job.text()


def test_a_refused_configuration_is_not_requeued(jobs):
    job = jobs["refused"]
    job.wait_for(lambda: job.field("JobState") in ("FAILED", "PENDING", "COMPLETED"))
    assert (job.field("JobState"), job.field("Restarts"), job.field("ExitCode")) == ("FAILED", "0", "2:0")
    assert "config: 'model.num_layers' is 0" in job.text() and "not requeued" in job.text()


def test_a_preempted_job_that_then_meets_its_time_limit_ends_with_the_same_losses(slurm, jobs):
    job, output = jobs["disturbed"], slurm.folder / "disturbed"
    finished = output / "FINISHED"
    while not finished.exists():
        if job.field("JobState") == "PENDING":
            job.release()
        if "received SIGTERM" not in job.text():  # its time may be up before it is preempted
            wanted = _iterations(output) + 3
            job.wait_for(lambda wanted=wanted: _iterations(output) >= wanted or finished.exists())
            slurm.submit("urgent", ["--wrap", "sleep 1"], HIGH, "--cpus-per-task=10")
        job.wait_for(lambda: finished.exists() or job.field("JobState") == "PENDING")  # FAILED for a moment
    text = job.text()
    assert "received SIGTERM" in text and "received SIGUSR1" in text and "Traceback" not in text
    whole = jobs["undisturbed"]
    whole.wait_for(lambda: (slurm.folder / "undisturbed" / "FINISHED").exists())
    assert _losses(output) == _losses(slurm.folder / "undisturbed")
    for signal, seconds in _seconds_to_requeue(text):
        print(f"{signal} to requeued: {seconds} s")


def test_preprocessing_as_an_array(slurm, jobs):
    folder = slurm.folder / "pictures"
    folder.mkdir()
    make_vq(folder / "vq")
    make_vocabulary(folder / "vocabulary")
    caption_tar(folder / "a.tar", 20)
    caption_tar(folder / "b.tar", 20, first=20)
    variables = {"PYTHON": sys.executable, "OUT": str(folder / "set"), "OMP_NUM_THREADS": "1", "ROOT": str(ROOT)}
    variables |= {"VQ": str(folder / "vq"), "VOCABULARY": str(folder / "vocabulary"), "PYTHONPATH": str(ROOT)}
    script = [ROOT / "examples" / "preprocess_slurm_array.sh", folder / "a.tar", folder / "b.tar"]
    options = [HIGH, "--gpus-per-task=0", "--cpus-per-task=1", f"--chdir={ROOT}"]
    array = slurm.submit("shards", script, "--array=1-2", *options, **variables)
    merge = slurm.submit(
        "merge", script[:1], "--array=1", f"--dependency=afterok:{array.number}", *options, **variables, MERGE="1"
    )
    merge.wait_for(lambda: merge.field("JobState") in ("COMPLETED", "FAILED"))
    assert merge.field("JobState") == "COMPLETED", array.text() + merge.text()
    metadata = json.loads((folder / "set.json").read_text())
    assert metadata["documents"] == 40


def test_a_study_whose_evaluation_is_cut_off_is_requeued_and_ends(slurm, jobs):
    folder = slurm.folder / "study"
    folder.mkdir()
    study = write_study(folder)
    tree = study.read_text() + "slurm: [--partition=high, --cpus-per-task=1, --time=10]\n"
    study.write_text(tree)
    command = [sys.executable, str(ROOT / "tools" / "scaling_study.py"), str(study)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    first = "tiny.first.tokens.seed1"
    run = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    submitted = subprocess.run([*command, "--slurm", "--run", first], **run, check=True)
    number = re.search(r"job (\d+)", submitted.stdout).group(1)
    job = slurm.job(f"{number}_1", folder / "out" / f"slurm-{number}-1.log")
    log = folder / "out" / "runs" / first / "log.txt"
    job.wait_for(lambda: log.exists() and "== " in log.read_text() and "evaluate.py" in log.read_text())
    subprocess.run(["scancel", "--batch", "--signal=TERM", job.number], check=True)  # as its time limit does
    job.wait_for(lambda: job.field("JobState") == "PENDING")
    assert "stopped by SIGTERM" in job.text()
    result = log.parent / "result.json"
    job.run_until(result.exists)
    job.wait_for(lambda: job.field("JobState") == "COMPLETED")
    status = subprocess.run([*command, "--run", first, "--status"], **run)
    assert status.stdout.splitlines()[-1] == "1 finished", job.text()


def _iterations(output) -> int:
    file = output / "metrics.jsonl"
    return len(read_metrics(file)) if file.exists() else 0


def _losses(output) -> list[float]:
    return [record["loss"] for record in read_metrics(output / "metrics.jsonl")]


def _seconds_to_requeue(text: str) -> list[tuple[str, float]]:
    """For every signal in a log of the launch script, the seconds until its job was requeued. Slurm sends SIGTERM of a
    preemption to the ranks alone, and says so."""
    found, told = [], None
    preempted = r"^slurmstepd\S* error: \*\*\* STEP \S+ ON \S+ CANCELLED AT \S+T(\S+) \*\*\*$"
    text = re.sub(preempted, r"\1 SIGTERM: preempted", text, flags=re.MULTILINE)
    for clock, said in re.findall(r"^(\d\d:\d\d:\d\d) (.*)$", text, re.MULTILINE):
        at = datetime.strptime(clock, "%H:%M:%S")
        if said.startswith("SIG") and told is None:
            told = (said.split(":")[0], at)
        elif "goes back" in said and told:
            found.append((told[0], (at - told[1]).seconds))
            told = None
    return found
