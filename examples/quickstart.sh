#!/usr/bin/env bash
# From nothing to a trained unified model and a page about what it can do, on a laptop without a GPU, in minutes.
#
#   bash examples/quickstart.sh
#
# Makes pictures with captions and questions, a tokenizer of the images and one of the texts, data sets; trains on two
# processes, each with its own rows; asks and draws; writes a report. Everything goes to runs/quickstart. What is
# complete is skipped, and what was stopped (Ctrl-C) is continued by the same command. Arguments override
# examples/configs/quickstart.yaml, such as training.iterations=2400.
#
#   METHOD=himix_hmgen_share_all bash examples/quickstart.sh
#
# then trains the same model from these weights with a method of examples/configs/methods; both are on the page.
# Environment variables (defaults): PYTHON (python3), VENV (.venv), NPROC, processes that train (2; 1 on one core).
set -euo pipefail
started=$(date +%s)
# shellcheck source-path=SCRIPTDIR source=_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
trap 'echo; echo "stopped; the same command goes on from here"; exit 130' INT

OUT=runs/quickstart
RUN=$OUT/training
METHOD=${METHOD:-}
cores=$(env -u OMP_NUM_THREADS nproc) # which would count as the number of cores
NPROC=${NPROC:-$((cores < 2 ? 1 : 2))}
CONFIG=examples/configs/quickstart.yaml
[[ $NPROC == [12] ]] || fail "NPROC=$NPROC: must be 1 or 2"
[[ -z $METHOD || -f examples/configs/methods/$METHOD.yaml ]] ||
    fail "METHOD=$METHOD: no such file in examples/configs/methods"
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

launch=("$PY")
((NPROC == 1)) || launch+=(-m torch.distributed.run --standalone --nproc_per_node "$NPROC")

run_training() { # arguments; a stopped launcher ends with a traceback, so standard error goes to a file
    "${launch[@]}" pretrain_unified.py --config "$CONFIG" "$@" 2>"$OUT/training.log" ||
        fail "$(grep '^pretrain_unified.py: ' "$OUT/training.log" || tail -n 20 "$OUT/training.log") (see $OUT/training.log)"
}

run_evaluation() { # folder of the run; its tables are long, and the report has their gist
    mkdir -p "$1/scores"
    "$PY" tools/evaluate.py --checkpoint "$1" --vq "$OUT/vq" --set-aside --batch-size 64 \
        --benchmark gqa --data "$OUT/benchmarks/validation/gqa" \
        --benchmark mjhq --data "$OUT/benchmarks/validation/mjhq" --temperature 0.6 --guidance 1.5 \
        --out "$1/scores" --json "$1/scores/scores.json" >"$1/scores/scores.md"
}

train() { # name, per cent before, per cent, folder of the run, arguments ...
    local name=$1 before=$2 share=$3 run=$4
    shift 4
    [[ ! -f $run/FINISHED || $OUT/preparation.json -ot $run/FINISHED ]] ||
        fail "$run was trained on earlier data; remove it to train again"
    step "$name, $NPROC processes" "$before" "$share" run_training "$@"
    [[ -f $run/FINISHED ]] || fail "$name stopped early; the same command continues it"
}

evaluate() { # name, per cent before, per cent, folder of the run
    if [[ $4/scores/scores.json -nt $4/FINISHED ]]; then
        echo "== $1: complete"
    else
        step "$1" "$2" "$3" run_evaluation "$4"
    fi
}

# Per cent of the whole are those of the first model; a further method only adds its own part.
step "pictures, tokenizers, data sets" 0 14 \
    "$PY" tools/prepare_picture_world.py examples/picture_worlds/quickstart.yaml --out "$OUT"
if [[ -f $RUN/FINISHED && $RUN/FINISHED -nt $OUT/preparation.json && ($# == 0 || -n $METHOD) ]]; then
    echo "== training: complete"
else
    [[ -z $METHOD ]] || fail "$RUN is not complete; first: bash examples/quickstart.sh"
    train "training" 14 77 "$RUN" "$@"
fi
evaluate "questions and pictures" 91 8 "$RUN"
if [[ -n $METHOD ]]; then
    reduced=$OUT/$METHOD
    # Trained from weights that are no longer those of the first model.
    [[ ! -f $reduced/FINISHED || $reduced/FINISHED -nt $RUN/FINISHED ]] || rm -r "$reduced"
    if [[ -f $reduced/FINISHED && $# == 0 ]]; then
        echo "== training with $METHOD: complete"
    else
        train "training with $METHOD, from these weights" 20 50 "$reduced" "examples/configs/methods/$METHOD.yaml" \
            checkpoint.load="$RUN" output="$reduced" training.iterations=300 optimizer.lr=1e-3 \
            optimizer.wsd_decay_iterations=200 "$@"
    fi
    evaluate "questions and pictures with $METHOD" 70 20 "$reduced"
fi

also=()
for run in "$OUT"/*/; do
    [[ ! -f ${run}FINISHED || ${run%/} == "$RUN" ]] || also+=("${run%/}")
done
complete=true
for scores in "$OUT"/*/scores/scores.json; do
    [[ $RUN/report.html -nt $scores ]] || complete=false
done
if $complete; then
    echo "== report: complete"
else
    step "report" 99 1 "$PY" tools/report.py --run "$RUN" --vq "$OUT/vq" --benchmarks "$OUT/benchmarks/validation" \
        ${also:+--also "${also[@]}"}
fi

measure_cpu
cat <<EOF

Done in $(($(date +%s) - started)) s, $CPU CPU-seconds. Open $ROOT/$RUN/report.html in a browser.

Next:
  # the same model with token reduction, from these weights, beside this one on the same page: a minute or two
  METHOD=himix_hmgen_share_all bash examples/quickstart.sh
  # a picture; the training data; more training
  source ${VENV@Q}/bin/activate
  python tools/generate.py --checkpoint $RUN --vq $OUT/vq --temperature 0.6 --prompt "A picture of a purple star."
  python tools/show_data.py --config $CONFIG
  bash examples/quickstart.sh training.iterations=2400
  # tensor parallelism
  torchrun --nproc_per_node 2 pretrain_unified.py --config $CONFIG parallel.tensor=2 output=$OUT/tensor_parallel
  # a harder world, with more objects, all kinds of questions and a trained VQ network: two hours (docs/picture_world.md)
  python tools/prepare_picture_world.py examples/picture_worlds/long.yaml --out runs/picture_world
  python pretrain_unified.py --config examples/configs/picture_world.yaml
  # your own data, GPUs, Slurm
  less README.md
EOF
