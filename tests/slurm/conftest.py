"""A Slurm for the tests of this folder, which are skipped where there can be none."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import one_machine
import pytest

from gpu.tiny_run import write_config
from support.programs import ROOT

DEADLINE = time.monotonic() + 270 * one_machine.SLOWER
"""A machine that has not done the jobs by then is too slow: that is no failure."""


class Job:
    """A submitted job and its log."""

    def __init__(self, number: str, log: Path):
        self.number, self.log = number, log

    def field(self, name: str) -> str:
        shown = subprocess.run(["scontrol", "show", "job", "-o", self.number], capture_output=True, text=True).stdout
        found = re.search(rf"(?:^|\s){name}=(\S*)", shown)
        return found.group(1) if found else ""

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for(self, condition) -> None:
        """Wait until the condition holds; the test is skipped if the machine is too slow."""
        while not condition():
            if time.monotonic() > DEADLINE:
                pytest.skip(f"too slow here: job {self.number} is {self.field('JobState')}")
            time.sleep(0.3)

    def release(self) -> None:
        """Let a requeued job start at once; Slurm would wait for two minutes."""
        self.wait_for(lambda: self.field("JobState") in ("PENDING", "RUNNING"))
        subprocess.run(["scontrol", "update", f"JobId={self.number}", "StartTime=now"], stderr=subprocess.DEVNULL)


class Slurm:
    """Submits jobs; files are in ``folder``."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = write_config(folder, rehearsal=True)

    def submit(self, name: str, script: list, *options: str, **environment: str) -> Job:
        """A job with its log in ``NAME.log``."""
        log = self.folder / f"{name}.log"
        options = ("--parsable", f"--job-name={name}", f"--output={log}", "--open-mode=append", *options)
        variables = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_JOB", "SLURM_STEP"))}
        done = subprocess.run(
            ["sbatch", *options, *map(str, script)], env=variables | environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return Job(done.stdout.strip(), log)

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
            yield slurm
    except one_machine.Unavailable as reason:
        pytest.skip(f"no Slurm here: {reason}")
    finally:
        if kept := os.environ.get("SLURM_TEST_LOG"):
            for log in folder.glob("*.log"):
                shutil.copy(log, kept)
