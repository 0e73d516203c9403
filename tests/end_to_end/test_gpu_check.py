"""The GPU check, rehearsed on a CPU: every step that needs no GPU runs once, and is not repeated."""

import json
import subprocess
import sys

import pytest

from parity import PLANS
from support.programs import run_program

NEED_A_GPU = {"fp8", "table_te_bf16", "table_te_fp8", "implementations"}


@pytest.fixture(scope="module")
def rehearse(tmp_path_factory):
    """A function that rehearses into one folder and returns the completed process."""
    results = tmp_path_factory.mktemp("gpu_check")

    def run() -> subprocess.CompletedProcess:
        command = ["bash", "benchmarks/gpu_check.sh", results, "--rehearse", "--minutes", 25]
        return run_program(command, check=False, timeout=1800, PYTHON=sys.executable)

    run.results = results
    return run


def test_the_rehearsal_runs_every_step_and_a_second_call_runs_none(rehearse):
    first = rehearse()
    log = (rehearse.results / "gpu_check.log").read_text()
    assert first.returncode == 0, first.stdout + log[-4000:]
    steps = json.loads((rehearse.results / "gpu_check.json").read_text())["steps"]
    for name, step in steps.items():
        assert step["status"] in (("not run",) if name in NEED_A_GPU else ("done",) + ("not run",) * (name == "dali"))
    assert {step["reason"] for name, step in steps.items() if name in NEED_A_GPU} == {"no GPU"}
    assert len(list((rehearse.results / "references").glob("*.pt"))) == len(PLANS)
    assert "A rehearsal" in (rehearse.results / "gpu.md").read_text()

    second = rehearse()
    assert second.returncode == 0
    assert (rehearse.results / "gpu_check.log").read_text() == log
    assert json.loads((rehearse.results / "gpu_check.json").read_text())["steps"] == steps


def test_without_a_gpu_it_says_how_to_rehearse(tmp_path):
    command = ["bash", "benchmarks/gpu_check.sh", str(tmp_path)]
    completed = run_program(command, check=False, PYTHON=sys.executable)
    assert completed.returncode == 1 and "no GPU here; --rehearse runs the same steps" in completed.stdout
    assert not list(tmp_path.iterdir())
