#!/usr/bin/env bash
# The tests that need a real Slurm: about 4 minutes. Where there can be none (no root, none installed, daemons that do not
# start), or the machine is too slow, a line says so and the exit code is 0. PY is the interpreter; SLURM_TEST_INSTALL=1
# lets them install Slurm with apt-get.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PY=${PY:-.venv/bin/python}

# Everything inside has a deadline of its own; SLURM_TIMEOUT is for a machine that stands still. SIGINT lets pytest end
# what it started, for which it may need a minute and a half.
status=0
timeout --foreground --signal=INT --kill-after=120 "${SLURM_TIMEOUT:-$((1500 * ${SLURM_TEST_SLOWER:-1}))}" \
    "$PY" -m pytest -m slurm -rs tests/slurm || status=$?
case $status in
124 | 137) echo "Slurm: the time is up; its tests are left out" ;;
*) exit "$status" ;;
esac
