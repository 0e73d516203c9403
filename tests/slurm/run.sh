#!/usr/bin/env bash
# The tests that need a real Slurm, within 5 minutes. Where there can be none (no root, no apt-get, daemons that do not
# start), or the machine is too slow, a line says so and the exit code is 0. PY is the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PY=${PY:-.venv/bin/python}

# The time box also holds the installation; SIGINT lets pytest end what it started.
status=0
timeout --foreground --signal=INT --kill-after=30 "${SLURM_TIMEOUT:-420}" \
    "$PY" -m pytest -m slurm -rs tests/slurm || status=$?
case $status in
0) ;;
124 | 137 | 2) echo "Slurm: not ready in time; its tests are left out" ;;
*) exit "$status" ;;
esac
