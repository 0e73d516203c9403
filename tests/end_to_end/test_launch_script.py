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
