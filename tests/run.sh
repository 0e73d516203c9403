#!/usr/bin/env bash
# Set-up, ruff, pytest, and jobs under a real Slurm where one can be started (tests/slurm). Arguments go to pytest:
#   bash tests/run.sh tests/unit -k vocabulary
#
# The other end of the supported range, Python 3.13 with the newest Megatron-Core, in an environment of its own:
#   PYTHON=python3.13 VENV=.venv-newest CONSTRAINTS=requirements/constraints-newest.txt bash tests/run.sh
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../examples/_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../examples/_setup.sh"

"$PY" -m ruff check .
"$PY" -m ruff format --check .
export OMP_NUM_THREADS=1
if (($#)); then
    exec timeout --foreground "${TEST_TIMEOUT:-3600}" "$PY" -m pytest "$@"
fi
timeout --foreground "${TEST_TIMEOUT:-3600}" "$PY" -m pytest
PY="$PY" bash tests/slurm/run.sh
