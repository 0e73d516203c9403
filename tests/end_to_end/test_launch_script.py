"""examples/run_unified_tp4_pp2.sh, the script itself, without Slurm: tensor 2 x pipeline 2, then one process."""

import json
import os
import subprocess
import sys

import pytest

from support.programs import ROOT


@pytest.mark.parametrize("chosen", ["", "max_split_size_mb:64"])
def test_the_allocators_segments_grow_unless_told_otherwise(chosen, tmp_path):
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!/bin/bash\necho {' '.join('$' + name for name in names)}\n")
    interpreter.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in (*names, "SLURM_JOB_ID")}
    environment |= {"PYTHON": str(interpreter), names[0]: chosen}
    script = ["bash", str(ROOT / "examples" / "run_unified_tp4_pp2.sh")]
    settings_of_torch = subprocess.run(
        script, env=environment, check=True, capture_output=True, text=True
    ).stdout.split()
    assert settings_of_torch == [chosen or "expandable_segments:True"] * 2


SCONTROL = """#!/bin/bash
case $2 in
hostnames) echo node1 ;;
job) echo "JobState=RUNNING" ;;
*) echo "requeued" ;;
esac
"""


@pytest.mark.parametrize(
    "code, trained, finished, outcomes",
    [
        (0, "", True, ["complete"]),
        (0, "", False, ["requeued"]),
        (1, "", False, ["1; not requeued"]),
        (1, "iter_0000004", False, ["requeued"]),
        (2, "iter_0000004", False, ["2; not requeued"]),
        (3, "iter_0000004", False, ["3; not requeued"]),
        (75, "", False, ["requeued", "requeued", "75; not requeued"]),
        (137, "", False, ["requeued", "requeued", "137; not requeued"]),
    ],
)
def test_the_script_requeues_its_job_if_that_may_help(code, trained, finished, outcomes, tmp_path):
    """With stand-ins for srun, which is told what training does, and scontrol. OUTPUT is given as an argument."""
    output, commands = tmp_path / "run", tmp_path / "bin"
    commands.mkdir()
    made = f"mkdir -p {output}/checkpoints/{trained}" + f"; touch {output}/FINISHED" * finished
    for name, text in {"scontrol": SCONTROL, "srun": f"#!/bin/bash\n{made}\nexit {code}\n"}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    environment = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1"}
    environment |= {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "MAX_LOST": "2", "PYTHON": sys.executable}
    environment.pop("SLURM_RESTART_COUNT", None)
    for outcome in outcomes:
        script = ["bash", str(ROOT / "examples" / "run_unified_tp4_pp2.sh"), f"output={output}"]
        done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=120)
        last = (done.stdout + done.stderr).strip().splitlines()[-1]
        assert outcome in last and (code if "not" in outcome else 0) == done.returncode, done.stdout + done.stderr


def test_the_script_trains_and_goes_on_with_other_numbers_of_processes(material, tmp_path):
    settings = {"OMP_NUM_THREADS": "1", "OUTPUT": str(tmp_path)}
    settings |= {"CONFIG": f"{ROOT}/examples/configs/tiny.yaml {material}/config.yaml", "MICRO_BATCH": "1"}
    settings |= {"PYTHON": sys.executable, "EXTRA": "checkpoint.interval=0 training.validation_interval=0"}
    settings["EXTRA"] += " logging.gradient_alignment_interval=0"

    def run(iterations: int, tensor: int, pipeline: int) -> list[dict]:
        layout = {"TP": tensor, "PP": pipeline, "NPROC": tensor * pipeline, "ITERATIONS": iterations}
        subprocess.run(
            ["bash", str(ROOT / "examples" / "run_unified_tp4_pp2.sh"), "model.num_layers=4"],
            cwd=tmp_path,
            env={**os.environ, **settings, **{name: str(value) for name, value in layout.items()}},
            check=True,
            timeout=600,
        )
        assert (tmp_path / "FINISHED").is_file()
        return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    first = run(4, tensor=2, pipeline=2)
    assert [m["iteration"] for m in first] == [1, 2, 3, 4]
    again = run(6, tensor=1, pipeline=1)
    assert again[:4] == first
    assert [m["iteration"] for m in again] == [1, 2, 3, 4, 5, 6]
