"""A Slurm for the tests of this folder, which are skipped where there can be none."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

import one_machine
import pytest

from gpu.tiny_run import write_config
from support.programs import ROOT

SECONDS = 600 * one_machine.SLOWER
"""For all jobs together; an idle machine of two cores needs about 200."""
SLOW_IMPORT = 6 * one_machine.SLOWER
"""Seconds to import torch on a machine that is too slow for the jobs; an idle one needs 2 or 3."""
FINAL = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")


def slow_machine() -> str:
    """How the machine is too slow; empty if it is not."""
    seconds = []
    for _ in range(2):  # the first may have to read it from the disk
        start = time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run([sys.executable, "-c", "import torch"], timeout=60 * one_machine.SLOWER, check=True)
        seconds.append(time.monotonic() - start)
    return f"importing torch takes {min(seconds):.0f} s" if min(seconds) > SLOW_IMPORT else ""


def command(*arguments: str) -> subprocess.CompletedProcess:
    """One of Slurm's commands."""
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120)


class Job:
    """A submitted job and its log."""

    def __init__(self, number: str, log: Path, deadline: float):
        self.number, self.log, self.deadline = number, log, deadline

    def field(self, name: str) -> str:
        shown = command("scontrol", "show", "job", "-o", self.number).stdout
        found = re.search(rf"(?:^|\s){name}=(\S*)", shown)
        return found.group(1) if found else ""

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for(self, condition) -> None:
        """Wait until the condition holds. The test fails if the job ends without it or the time is up, and is skipped
        if the machine has become too slow meanwhile."""
        ended = 0
        while not condition():
            state = self.field("JobState")
            ended = ended + 1 if state in FINAL else 0  # files and requeues take up to half a minute
            assert ended < 100, f"job {self.number} is {state}: {self.text()[-3000:]}"
            if time.monotonic() > self.deadline:
                if slow := slow_machine():
                    pytest.skip(f"the machine is too slow, {slow}: job {self.number} is {state}")
                pytest.fail(f"job {self.number} is still {state}: {self.text()[-3000:]}")
            time.sleep(0.3)

    def release(self) -> None:
        """Let a requeued job start in a few seconds; Slurm would wait for two minutes."""
        self.wait_for(self._released)

    def run_until(self, condition) -> None:
        """Wait as ``wait_for`` does; whenever the job is pending, it is released. (While Slurm requeues it, it may show
        PENDING, then FAILED, then PENDING again.)
        """

        def done() -> bool:
            self._released()
            return condition()

        self.wait_for(done)

    def _released(self) -> bool:
        if (state := self.field("JobState")) != "PENDING":
            return state == "RUNNING"
        if datetime.fromisoformat(self.field("EligibleTime")) < datetime.now() + timedelta(seconds=10):
            return True
        # Not at once: slurmd refuses a job that starts in the second of its requeue ("Job credential revoked").
        return command("scontrol", "update", f"JobId={self.number}", "StartTime=now+3seconds").returncode == 0


class Slurm:
    """Submits jobs; files are in ``folder``."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.deadline = time.monotonic() + SECONDS
        self.config = write_config(folder, rehearsal=True)

    def submit(self, name: str, script: list, *options: str, **environment: str) -> Job:
        """A job with its log in ``NAME.log``."""
        log = self.folder / f"{name}.log"
        options = ("--parsable", f"--job-name={name}", f"--output={log}", "--open-mode=append", *options)
        assignments = [f"{name}={value}" for name, value in environment.items()]
        done = command("env", *assignments, "sbatch", *options, *map(str, script))
        assert done.returncode == 0, done.stderr
        return self.job(done.stdout.strip(), log)

    def job(self, number: str, log: Path) -> Job:
        """One that somebody else has submitted."""
        return Job(number, log, self.deadline)

    def train(self, name: str, *options: str, overrides: tuple = (), ranks: int = 2, **environment: str) -> Job:
        """The launch script with the tiny configuration; its output folder is ``NAME``."""
        settings = ["training.precision=float32", "logging.tensorboard=false", "checkpoint.keep=0"]
        settings += ["callbacks=[slow_steps:SlowSteps]", "lifecycle.slurm_margin_minutes=0"]
        variables = {
            "CONFIG": str(self.config),
            "OUTPUT": str(self.folder / name),
            "TP": "1",
            "PP": "1",
            "NPROC": str(ranks),
            "PYTHON": sys.executable,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}",
            "ROOT": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "EXTRA": " ".join([*settings, *overrides]),
        }
        script = [ROOT / "examples" / "run_unified_tp4_pp2.sh"]
        return self.submit(name, script, "--gpus-per-node=0", *options, **(variables | environment))


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A Slurm that has done a job already. With ``SLURM_TEST_LOG=FOLDER``, all logs are kept there."""
    folder = tmp_path_factory.mktemp("slurm")
    try:
        with one_machine.running(folder / "daemons"):
            slurm = Slurm(folder)
            trial = slurm.submit("trial", ["--wrap", "srun --ntasks=1 true && echo works"], "--partition=high")
            until = time.monotonic() + 30 * one_machine.SLOWER
            while "works" not in trial.text():
                if time.monotonic() > until:
                    raise one_machine.Unavailable(f"a job of one command does not end: {trial.text()[-300:]}")
                time.sleep(0.3)
            if slow := slow_machine():
                raise one_machine.Unavailable(f"the machine is too slow, {slow}")
            yield slurm
    except one_machine.Unavailable as reason:
        pytest.skip(f"no Slurm here: {reason}")
    finally:
        if kept := os.environ.get("SLURM_TEST_LOG"):
            for log in folder.glob("*.log"):
                shutil.copy(log, kept)
