#!/usr/bin/env bash
# The GPU path proved in one run, on a machine with at least one NVIDIA GPU:
#
#   pip install -e '.[gpu]' && bash benchmarks/gpu_check.sh [RESULTS]
#
# Layouts against one GPU, step time in bf16 at the size of Llama 3.2 1B, data through DALI to the GPU, and training
# with torch's and with Transformer Engine's layers on the same data, whose losses must agree. Needs runs/quickstart
# (examples/quickstart.sh). From the environment: PYTHON.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
RESULTS=${1:-benchmarks/results/gpu}

fail() {
    echo "error: $*" >&2
    exit 1
}
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
((gpus > 0)) || fail "no GPU here (nvidia-smi lists none)"
[[ -f runs/quickstart/data/captions-train.json ]] || fail "runs/quickstart: no data; run examples/quickstart.sh first"
mkdir -p "$RESULTS"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$RESULTS/gpus.csv"

layouts=tp1
((gpus < 2)) || layouts+=,tp2,tp2-sp,tp1-pp2,tp1-pp2-vp2,tp1-dp2
((gpus < 4)) || layouts+=,tp2-pp2-sp,tp4-sp,tp2-pp2-vp2
((gpus < 8)) || layouts+=,tp2-pp2-sp-dp2,tp4-pp2-sp
timeout 1800 "$PYTHON" benchmarks/parity.py --layouts "$layouts" --json "$RESULTS/parity.json"
timeout 900 "$PYTHON" benchmarks/step_time.py --precision bf16 --layers 16 --hidden-size 2048 --rows 14 --repeats 20 \
    --json "$RESULTS/step_time.json"
timeout 900 "$PYTHON" benchmarks/data.py --json "$RESULTS/data.json"

implementations=(local)
"$PYTHON" -c 'import transformer_engine' 2>/dev/null && implementations+=(transformer_engine) ||
    echo "Transformer Engine is not installed: its layers are not checked"
for implementation in "${implementations[@]}"; do
    output=$RESULTS/training-$implementation
    rm -rf "$output"
    timeout 900 "$PYTHON" pretrain_unified.py --config examples/configs/quickstart.yaml "output=$output" \
        training.iterations=40 training.precision=bf16 checkpoint.interval=20 \
        "model.implementation=$implementation" data.loader=dali
done
"$PYTHON" - "${implementations[@]/#/$RESULTS/training-}" <<'PY'
import json
import sys
from pathlib import Path

runs = [[json.loads(line)["loss"] for line in Path(r, "metrics.jsonl").open()] for r in sys.argv[1:]]
for run, losses in zip(sys.argv[1:], runs):
    worst = max(abs(a - b) / b for a, b in zip(losses, runs[0]))
    print(f"{run}: loss {losses[0]:.4f} -> {losses[-1]:.4f}; differs from torch's layers by {100 * worst:.2f} % at most")
    if worst > 0.03 or losses[-1] > 0.8 * losses[0]:
        sys.exit(f"error: {run}: losses differ, or do not fall")
PY
echo "all checks passed; results in $RESULTS"
