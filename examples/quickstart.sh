#!/usr/bin/env bash
# From nothing to a trained unified model and a page about what it can do, on a laptop without a GPU, in minutes.
#
#   bash examples/quickstart.sh
#
# Makes pictures with captions and questions, a tokenizer of the images and one of the texts, data sets; trains on two
# processes, each with its own rows; asks and draws; writes a report. Everything goes to runs/quickstart. What is
# complete is skipped, and what was stopped (Ctrl-C) is continued by the same command. Arguments override
# examples/configs/quickstart.yaml, such as training.iterations=1000.
# Environment variables (defaults): PYTHON (Python 3.11), VENV (.venv), NPROC, processes that train (2; 1 on one core).
set -euo pipefail
started=$(date +%s)
# shellcheck source-path=SCRIPTDIR source=_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
trap 'echo; echo "stopped; the same command goes on from here"; exit 130' INT

OUT=runs/quickstart
RUN=$OUT/training
SCORES=$RUN/scores/scores.json
cores=$(env -u OMP_NUM_THREADS nproc) # which would count as the number of cores
NPROC=${NPROC:-$((cores < 2 ? 1 : 2))}
CONFIG=examples/configs/quickstart.yaml
export OMP_NUM_THREADS=1
mkdir -p "$OUT"

measure_cpu() { # sets CPU, the seconds of the commands that have ended
    times >"$OUT/.times" # in a process of its own it would not count them
    CPU=$(awk -F '[ms ]+' 'NR == 2 { printf "%.0f", 60 * $1 + $2 + 60 * $3 + $4 }' "$OUT/.times")
}

step() { # name, per cent of the whole before it, per cent that it is, command ...
    local name=$1 whole=$2,$3 begun=$SECONDS cpu
    shift 3
    echo "== $name"
    measure_cpu
    cpu=$CPU
    PROGRESS_OF_WHOLE=$whole "$@" || fail "$name failed; the command was: $*"
    measure_cpu
    echo "   ($((SECONDS - begun)) s, $((CPU - cpu)) CPU-seconds)"
}

train() { # a stopped launcher ends with a traceback, so standard error goes to a file
    "${launch[@]}" pretrain_unified.py --config "$CONFIG" "$@" 2>"$OUT/training.log" ||
        fail "$(grep '^pretrain_unified.py: ' "$OUT/training.log" || tail -n 20 "$OUT/training.log") (see $OUT/training.log)"
}

evaluate() {
    "$PY" tools/evaluate.py --checkpoint "$RUN" --vq "$OUT/vq" --set-aside \
        --benchmark gqa --data "$OUT/benchmarks/validation/gqa" \
        --benchmark mjhq --data "$OUT/benchmarks/validation/mjhq" \
        --out "$RUN/scores" --json "$SCORES" >"$RUN/scores/scores.md" # long tables; the report has their gist
}

launch=("$PY")
((NPROC == 1)) || launch+=(-m torch.distributed.run --standalone --nproc_per_node "$NPROC")

step "pictures, tokenizers, data sets" 0 10 \
    "$PY" tools/prepare_picture_world.py examples/picture_worlds/quickstart.yaml --out "$OUT"
if [[ -f $RUN/FINISHED && $# == 0 ]]; then
    echo "== training: complete"
else
    step "training on $NPROC processes" 10 75 train "$@"
    [[ -f $RUN/FINISHED ]] || fail "training stopped early; the same command continues it"
fi
if [[ $SCORES -nt $RUN/FINISHED ]]; then
    echo "== questions and pictures: complete"
else
    mkdir -p "$RUN/scores"
    step "questions and pictures" 85 12 evaluate
fi
if [[ $RUN/report.html -nt $SCORES ]]; then
    echo "== report: complete"
else
    step "report" 97 3 "$PY" tools/report.py --run "$RUN" --vq "$OUT/vq" --benchmarks "$OUT/benchmarks/validation"
fi

measure_cpu
cat <<EOF

Done in $(($(date +%s) - started)) s, $CPU CPU-seconds. Open $ROOT/$RUN/report.html in a browser.

Next, after: source $VENV/bin/activate
  # the same model with token reduction (HiMix-HMGen), from the dense weights, and both on one page
  python pretrain_unified.py --config $CONFIG examples/configs/methods/himix_hmgen_share_all.yaml \\
      checkpoint.load=$RUN output=$OUT/himix_hmgen
  python tools/report.py --run $RUN --vq $OUT/vq --benchmarks $OUT/benchmarks/validation \\
      --also $OUT/himix_hmgen
  # a picture; an answer; the training data; more training
  python tools/generate.py --checkpoint $RUN --vq $OUT/vq --prompt "A picture of a red circle."
  python tools/show_data.py --config $CONFIG
  bash examples/quickstart.sh training.iterations=1000
  # tensor parallelism; a trained VQ network and a richer world, in an hour
  torchrun --nproc_per_node 2 pretrain_unified.py --config $CONFIG parallel.tensor=2 output=$OUT/tensor_parallel
  python tools/prepare_picture_world.py examples/picture_worlds/long.yaml --out runs/picture_world
  python pretrain_unified.py --config examples/configs/picture_world.yaml
  # your own data, GPUs, Slurm
  less README.md
EOF
