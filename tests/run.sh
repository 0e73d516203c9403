#!/usr/bin/env bash
# Set-up, ruff, pytest. Arguments go to pytest:  bash tests/run.sh tests/unit -k vocabulary
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../examples/_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../examples/_setup.sh"

"$PY" -m ruff check .
"$PY" -m ruff format --check .
export OMP_NUM_THREADS=1
exec timeout --foreground "${TEST_TIMEOUT:-3600}" "$PY" -m pytest "$@"
