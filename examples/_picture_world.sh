# shellcheck shell=bash
# Source this file. Makes pictures, tokenizers, data sets and benchmarks of the picture world; complete ones are kept.
#
#   make_picture_world FOLDER    makes FOLDER/{scenes,benchmarks,vq,vocabulary,data}
#
# Settings (defaults): SIZE, pixels along a side (54); GRID, codes along a side (9: three per cell of a scene); CODES of
# the VQ tokenizer (1024); VQ_STEPS, its training steps (1200); VQ, further options of tools/train_vq.py; TRAIN, scenes
# (4000); QUESTIONS per scene (6); PICTURES per benchmark (40); SCENES, further options of tools/make_scenes.py.
# Source _setup.sh first.

step() { # name, seconds allowed, command ...
    local name=$1 seconds=$2 begun=$SECONDS
    shift 2
    echo "== $name"
    if [[ $(type -t "$1") == function ]]; then "$@"; else timeout "$seconds" "$@"; fi ||
        fail "$name failed; the command was: $*"
    echo "   ($((SECONDS - begun)) s)"
}

make_picture_world() {
    local out=$1 size=${SIZE:-54} grid=${GRID:-9} split
    local -a options vq_options
    read -ra options <<<"${SCENES:-}"
    read -ra vq_options <<<"${VQ:-}"
    step "pictures, captions, questions" 1800 \
        "$PY" tools/make_scenes.py --out "$out/scenes" --size "$size" --train "${TRAIN:-4000}" \
        --questions "${QUESTIONS:-6}" --workers 2 "${options[@]}"
    step "benchmarks: known combinations in new pictures, and held-out ones" 600 _benchmarks "$out" "$size" "${options[@]}"
    if [[ -f $out/vq/training.json ]]; then
        echo "== VQ tokenizer: complete"
    else
        step "VQ tokenizer" 3600 "$PY" tools/train_vq.py --images "$out"/scenes/train/*.tar --out "$out/vq" \
            --image-size "$size" --grid "$grid" --patch $((size / grid)) --codebook-size "${CODES:-1024}" \
            --steps "${VQ_STEPS:-1200}" "${vq_options[@]}"
    fi
    step "text tokenizer and vocabulary" 300 "$PY" tools/train_tokenizer.py \
        --texts "$out"/scenes/train/*.tar "$out/scenes/train/text.jsonl" --vocab-size 512 \
        --vq "$out/vq" --out "$out/vocabulary"
    for split in train validation; do
        _data_set "$out" "questions-$split" "$out/scenes/$split/$split"-*.tar --vq "$out/vq" --as conversation
        _data_set "$out" "captions-$split" "$out/scenes/$split/$split"-*.tar --vq "$out/vq" --as caption
        _data_set "$out" "texts-$split" "$out/scenes/$split/text.jsonl"
    done
}

_benchmarks() { # folder, size, options ...
    local split
    for split in validation test; do
        "$PY" tools/make_scenes.py --benchmarks "$1/benchmarks/$split" --benchmark-split "$split" --size "$2" \
            --benchmark-pictures "${PICTURES:-40}" "${@:3}"
    done
}

_data_set() { # folder, name, inputs and options ...
    step "data set $2" 3600 "$PY" tools/preprocess_vq.py "${@:3}" --vocabulary "$1/vocabulary" --out "$1/data/$2"
}
