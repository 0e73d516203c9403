#!/usr/bin/env bash
# The GPU path proved in one run of under nine minutes, on one GPU; docs/gpu.md is its page.
#
#   bash benchmarks/gpu_check.sh RESULTS --rehearse      on a CPU: a test, and the references for float32
#   bash benchmarks/gpu_check.sh RESULTS                 on the GPU; again, it goes on with what is missing
#   bash benchmarks/gpu_check.sh RESULTS --page docs/gpu.md
#
# Works in a checkout that is not installed. From the environment: PYTHON, WAIT_FOR_TE (see docs/gpu.md).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# While Transformer Engine is being built it is left alone; the steps that need it look again.
export WITHOUT_TRANSFORMER_ENGINE=1
exec "$PYTHON" benchmarks/gpu_check.py "$@"
