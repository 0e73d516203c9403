#!/usr/bin/env bash
# Data of examples/configs/picture_world*.yaml and examples/studies/picture_world.yaml, in runs/picture_world.
#
#   bash examples/prepare_picture_world.sh     a quarter of an hour on two CPU cores; complete files are kept
#
# Scenes have few kinds of objects, equal objects look equal, and an object is four tokens that depend on nothing else,
# so that small models learn to see soon. 30,000 scenes have captions and two questions each, so that half of the tokens
# are images; 40,000 other scenes have eight questions each. The last three sets ask what models learn last.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
# shellcheck source-path=SCRIPTDIR source=_picture_world.sh
source examples/_picture_world.sh

OUT=runs/picture_world
WORLD="--variation 0 --kinds-of-things 4 --most-objects 4"

SCENES="$WORLD --with-choices 0" TRAIN=30000 QUESTIONS=2 GRID=6 VQ=--local VQ_STEPS=3000 PICTURES=120 make_picture_world $OUT
# shellcheck disable=SC2086
more_scenes() { # name of the questions, options of tools/make_scenes.py ...
    step "scenes with $1" 600 "$PY" tools/make_scenes.py --out "$OUT/$1-scenes" --size 54 $WORLD \
        --validation 0 --test 0 --forms tar --workers 2 "${@:2}"
    _data_set $OUT "$1-train" "$OUT/$1-scenes"/train/*.tar --vq $OUT/vq --as conversation
}

more_scenes more-questions --seed 4321 --train 40000 --questions 8
more_scenes relation-questions --seed 5678 --train 24000 --questions 8 --kinds relation direction comparison statement \
    --with-choices 0 --with-instruction 0.5
# Two questions per scene: the answers of further ones would follow from the first two.
more_scenes side-questions --seed 6789 --train 36000 --questions 2 --kinds side --with-choices 0 --with-instruction 0.5
more_scenes relations --seed 8765 --train 44000 --questions 2 --kinds relation --with-choices 0 --with-instruction 0.5
