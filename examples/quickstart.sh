#!/usr/bin/env bash
# From nothing to a trained unified model and a report, on a laptop: no GPU, some minutes.
#
#   bash examples/quickstart.sh
#
# Makes pictures with captions and questions, trains a VQ tokenizer and a text tokenizer on them, turns them into data
# sets, trains on two processes with tensor parallelism, and writes a report. Everything goes to runs/quickstart; what is
# complete is not done again. Arguments are overrides of examples/configs/quickstart.yaml, such as
# training.iterations=1000. From the environment: PYTHON (a Python 3.11 to start from), VENV (.venv), TP (2).
set -euo pipefail
started=$SECONDS
# shellcheck source-path=SCRIPTDIR source=_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

OUT=runs/quickstart
TP=${TP:-2}
SIZE=48 GRID=12 # pixels along a side; 4 x 4 of them are one token, so an image is 144
mkdir -p "$OUT"

step() { # name, seconds allowed, command ...
    local name=$1 seconds=$2 begun=$SECONDS
    shift 2
    echo "== $name"
    timeout "$seconds" "$@" || fail "$name failed; the command was: $*"
    echo "   ($((SECONDS - begun)) s)"
}

preprocess() { # data set, inputs and options ...
    "$PY" tools/preprocess_vq.py "${@:2}" --vocabulary "$OUT/vocabulary" --out "$OUT/data/$1"
}

prepare_data() {
    local split
    for split in train validation; do
        preprocess "questions-$split" "$OUT/scenes/$split/$split"-*.tar --vq "$OUT/vq" --as conversation
        preprocess "captions-$split" "$OUT/scenes/$split/$split"-*.tar --vq "$OUT/vq" --as caption
        preprocess "texts-$split" "$OUT/scenes/$split/text.jsonl"
    done
}
export -f preprocess prepare_data
export OUT PY

step "pictures, captions, questions" 300 \
    "$PY" tools/make_scenes.py --out "$OUT/scenes" --size $SIZE --train 4000 --workers 2
if [[ -f $OUT/vq/training.json ]]; then
    echo "== VQ tokenizer: complete"
else
    step "VQ tokenizer" 900 \
        "$PY" tools/train_vq.py --images "$OUT"/scenes/train/*.tar --out "$OUT/vq" --image-size $SIZE --grid $GRID --steps 1200
fi
step "text tokenizer and vocabulary" 120 "$PY" tools/train_tokenizer.py \
    --texts "$OUT"/scenes/train/*.tar "$OUT/scenes/train/text.jsonl" --vocab-size 512 \
    --vq "$OUT/vq" --out "$OUT/vocabulary"
step "data sets" 600 bash -euo pipefail -c prepare_data
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
  bash examples/quickstart.sh training.iterations=1000          train longer: goes on where this ended
  python tools/show_data.py --config examples/configs/quickstart.yaml     what the model was fed
  TP=2 PP=2 CONFIG=examples/configs/quickstart.yaml bash examples/run_unified_tp4_pp2.sh     four processes
  less README.md                                                your own data, GPUs, Slurm
EOF
