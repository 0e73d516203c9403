"""The GPU check, rehearsed on a CPU: every step runs that needs no GPU, and what is done is not done again."""

import json
import os
import subprocess
import sys

import pytest

from support.programs import ROOT

NEED_A_GPU = {"fp8", "table_te_bf16", "table_te_fp8", "implementations"}


@pytest.fixture(scope="module")
def rehearse(tmp_path_factory):
    """A function that rehearses into one folder, from outside an installation, and gives the completed process."""
    results = tmp_path_factory.mktemp("gpu_check")

    def run() -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", "benchmarks/gpu_check.sh", str(results), "--rehearse"],
            cwd=ROOT,
            env={**os.environ, "PYTHON": sys.executable},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )

    run.results = results
    return run


def test_the_rehearsal_runs_every_step_and_a_second_call_none(rehearse):
    first = rehearse()
    log = (rehearse.results / "gpu_check.log").read_text()
    assert first.returncode == 0, first.stdout + log[-4000:]
    steps = json.loads((rehearse.results / "gpu_check.json").read_text())["steps"]
    for name, step in steps.items():
        assert step["status"] in (("not run",) if name in NEED_A_GPU else ("done",) + ("not run",) * (name == "dali"))
    assert {step["reason"] for name, step in steps.items() if name in NEED_A_GPU} == {"no GPU"}
    assert len(list((rehearse.results / "references").glob("*.pt"))) == 7
    assert "A rehearsal" in (rehearse.results / "gpu.md").read_text()

    second = rehearse()
    assert second.returncode == 0
    assert (rehearse.results / "gpu_check.log").read_text() == log
    assert json.loads((rehearse.results / "gpu_check.json").read_text())["steps"] == steps


def test_without_a_gpu_it_says_what_can_be_done(tmp_path):
    command = ["bash", "benchmarks/gpu_check.sh", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert done.returncode == 1 and "no GPU here; --rehearse runs the same steps" in done.stderr
    assert not list(tmp_path.iterdir())
