#!/usr/bin/env bash
# The GPU path proved in one run, on a machine with at least one NVIDIA GPU:
#
#   bash benchmarks/gpu_check.sh [RESULTS]      in the environment that the README makes for GPUs
#
# Layouts against one GPU under every plan; step time of the plans in bf16 and FP8 at the size of Llama 3.2 1B and rows of
# 4096 tokens, with MFU; data through DALI to the GPU; and training with torch's and with Transformer Engine's layers, in
# bf16 and in FP8, on the same data, whose losses must agree. Needs runs/quickstart (examples/quickstart.sh). From the
# environment: PYTHON.
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
one_billion=(--config examples/configs/llama-3.2-1b.yaml --precision bf16 --sequence 4096 --rows 2 --repeats 10)
timeout 1800 "$PYTHON" benchmarks/step_time.py "${one_billion[@]}" --json "$RESULTS/step_time_bf16.json" |
    tee "$RESULTS/step_time_bf16.md"
if "$PYTHON" -c 'import transformer_engine' 2>/dev/null; then
    timeout 1800 "$PYTHON" benchmarks/step_time.py "${one_billion[@]}" --fp8 current --only \
        "dense,himix,hmgen,separate,decomposed" --json "$RESULTS/step_time_fp8.json" | tee "$RESULTS/step_time_fp8.md"
fi
timeout 900 "$PYTHON" benchmarks/data.py --json "$RESULTS/data.json"

declare -A runs=([local]="model.implementation=local")
if "$PYTHON" -c 'import transformer_engine' 2>/dev/null; then
    runs[transformer_engine]="model.implementation=transformer_engine"
    runs[fp8]="model.implementation=transformer_engine training.fp8=current"
else
    echo "Transformer Engine is not installed: its layers are not checked"
fi
names=(local $(printf '%s\n' "${!runs[@]}" | grep -vx local || true))
for name in "${names[@]}"; do
    output=$RESULTS/training-$name
    rm -rf "$output"
    # shellcheck disable=SC2086  # several settings
    timeout 900 "$PYTHON" pretrain_unified.py --config examples/configs/quickstart.yaml "output=$output" \
        plan.preset=himix_hmgen_share_partial training.iterations=40 training.precision=bf16 checkpoint.interval=20 \
        ${runs[$name]} data.loader=dali
done
"$PYTHON" - "${names[@]/#/$RESULTS/training-}" <<'PY'
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
