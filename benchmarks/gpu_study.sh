#!/usr/bin/env bash
# The study of deeper models on one GPU, in under nine minutes; docs/study/gpu.md is its page.
#
#   bash benchmarks/gpu_study.sh RESULTS --prepare       on a CPU: the data and the lengths of the runs, into RESULTS
#   bash benchmarks/gpu_study.sh RESULTS                 on the GPU; a second call resumes with the missing runs
#   bash benchmarks/gpu_study.sh RESULTS --page docs/study/gpu.md
#   bash benchmarks/gpu_study.sh REHEARSAL --rehearse    all of it at tiny sizes on a CPU
#
# Works in a checkout without installation. Environment variable: PYTHON.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export WITHOUT_TRANSFORMER_ENGINE=1
exec "$PYTHON" benchmarks/gpu_study.py "$@"
