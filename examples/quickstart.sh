#!/usr/bin/env bash
# From nothing to a trained unified model and a report, on a laptop without a GPU, in some minutes.
#
#   bash examples/quickstart.sh
#
# Makes pictures with captions and questions, trains a VQ tokenizer and a text tokenizer on them, turns them into data
# sets, trains on two processes with tensor parallelism, and writes a report. Everything goes to runs/quickstart;
# complete steps are skipped. Arguments override examples/configs/quickstart.yaml, such as training.iterations=1000.
# Environment variables (defaults): PYTHON (Python 3.11), VENV (.venv), TP (2).
set -euo pipefail
started=$SECONDS
# shellcheck source-path=SCRIPTDIR source=_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
# shellcheck source-path=SCRIPTDIR source=_picture_world.sh
source examples/_picture_world.sh

OUT=runs/quickstart
TP=${TP:-2}
mkdir -p "$OUT"
make_picture_world "$OUT"
OMP_NUM_THREADS=$((n = $(nproc) / TP, n > 0 ? n : 1))
export OMP_NUM_THREADS
if [[ -f $OUT/training/FINISHED && $# == 0 ]]; then
    echo "== training: complete"
else
    step "training, tensor parallel over $TP processes" 3600 "$PY" -m torch.distributed.run --standalone \
        --nproc_per_node "$TP" pretrain_unified.py --config examples/configs/quickstart.yaml "parallel.tensor=$TP" "$@"
fi
step "report" 120 "$PY" tools/report.py --run "$OUT/training" --vq "$OUT/vq"

cat <<EOF

Done in $((SECONDS - started)) s. Open $ROOT/$OUT/training/report.html in a browser.

Next:
  source $VENV/bin/activate                                     for python and its packages
  bash examples/quickstart.sh training.iterations=1000          train longer: resumes this run
  python tools/show_data.py --config examples/configs/quickstart.yaml     the training data
  python tools/generate.py --checkpoint $OUT/training --vq $OUT/vq --prompt "A picture of a red circle."     a picture
  python tools/evaluate.py --checkpoint $OUT/training --vq $OUT/vq --benchmark gqa --data $OUT/benchmarks/test/gqa \\
      --out $OUT/answers                                        scores on combinations that training never showed
  TP=2 PP=2 CONFIG=examples/configs/quickstart.yaml bash examples/run_unified_tp4_pp2.sh evaluation.interval=0
  less README.md                                                your own data, GPUs, Slurm
EOF
