#!/usr/bin/env bash
# Checks the GPU path in under nine minutes on one GPU; docs/gpu.md is its page.
#
#   bash benchmarks/gpu_check.sh RESULTS --rehearse      on a CPU: a test, and the references for float32
#   bash benchmarks/gpu_check.sh RESULTS                 on the GPU; a second call resumes with the missing steps
#   bash benchmarks/gpu_check.sh RESULTS --page docs/gpu.md
#
# Works in a checkout without installation. Environment variables: PYTHON, WAIT_FOR_TE (see docs/gpu.md).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# Transformer Engine may still be building: it is left alone until a step needs it.
export WITHOUT_TRANSFORMER_ENGINE=1
exec "$PYTHON" benchmarks/gpu_check.py "$@"
