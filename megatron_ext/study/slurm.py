"""A study as a Slurm array with one task per run.

Not by submitit: it pickles a Python function, requeues only on its own timeout signal, ignores SIGTERM, and cannot
print a script; here a task is a command that anyone can submit, and the run's folder decides about the requeue.
"""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.files import write_text
from megatron_ext.study.grid import StudyRun
from megatron_ext.study.steps import ROOT
from megatron_ext.study.study_file import Study

SCRIPT = """#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --array=1-{count}
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --open-mode=append
#SBATCH --output={output}/slurm-%A-%a.log
{options}
# Task number SLURM_ARRAY_TASK_ID of the array does that run of the list. Training saves and exits before the job's time
# limit (lifecycle.slurm_margin_minutes); SIGTERM ends an evaluation 120 seconds before. The task is then requeued, at
# most MAX_RESTARTS (100) times, and goes on with the run.
set -euo pipefail
cd {directory}
runs=(
{runs}
)
run=${{runs[SLURM_ARRAY_TASK_ID - 1]}}
export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-${{SLURM_CPUS_PER_TASK:-1}}}}
told=
trap 'told=1; kill "$work" 2>/dev/null' TERM USR1
{command} --run "$run" &
work=$!
status=0
wait "$work" || status=$?
while kill -0 "$work" 2>/dev/null; do # a signal ends wait, but not the work
    wait "$work" || status=$?
done
if ((status)) && [[ -z $told ]]; then
    exit "$status"
fi
state=$({command} --run "$run" --status) # fails where this fails
if ! grep -qE "^1 (finished|diverged)$" <<<"$state"; then
    if ((${{SLURM_RESTART_COUNT:-0}} >= ${{MAX_RESTARTS:-100}})); then
        echo "not requeued: MAX_RESTARTS is ${{MAX_RESTARTS:-100}}" >&2
        exit 1
    fi
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
fi
"""


def script(study: Study, study_files: Sequence[Path], runs: Sequence[StudyRun]) -> str:
    """The batch script of the given runs."""
    command = [sys.executable, str(ROOT / "tools" / "scaling_study.py"), *map(str, study_files), "--out", study.output]
    return SCRIPT.format(
        name=study.name,
        count=len(runs),
        output=shlex.quote(study.output),
        options="".join(f"#SBATCH {option}\n" for option in study.slurm),
        directory=shlex.quote(str(Path.cwd())),
        runs="\n".join(shlex.quote(run.name) for run in runs),
        command=shlex.join(command),
    )


def submit(study: Study, study_files: Sequence[Path], runs: Sequence[StudyRun]) -> str:
    """Write the script and submit it with ``sbatch``; trials of learning rates as an array of their own, after whose
    end the others start. Returns the id of the last job.

    Raises:
        UserError: ``sbatch`` is missing or refuses the script.
    """
    job = ""
    for name, some in (
        ("slurm-trials.sh", [r for r in runs if r.is_trial]),
        ("slurm.sh", [r for r in runs if not r.is_trial]),
    ):
        if some:
            file = Path(study.output) / name
            write_text(file, script(study, study_files, some))
            job = _submit(file, [f"--dependency=afterany:{job}"] if job else [])
    return job


def _submit(file: Path, options: list[str]) -> str:
    try:
        done = subprocess.run(["sbatch", "--parsable", *options, str(file)], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"sbatch is not on this machine; {file} is written and can be submitted elsewhere") from None
    if done.returncode:
        raise UserError(f"sbatch refused {file}: {' '.join(done.stderr.split())}")
    return done.stdout.strip()
