#!/usr/bin/env bash
# Data of examples/configs/picture_world.yaml and examples/studies/picture_world.yaml, in runs/picture_world.
#
#   bash examples/prepare_picture_world.sh     some ten minutes on two CPU cores; what is complete is not made again
#
# Scenes have few kinds of things, equal objects look equal, and an object is four tokens, so that small models learn to
# see soon. Of 30,000 there are captions and two questions each, so that half of the tokens are images; of 40,000 others
# there are eight questions each.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
# shellcheck source-path=SCRIPTDIR source=_picture_world.sh
source examples/_picture_world.sh

OUT=runs/picture_world
WORLD="--variation 0 --kinds-of-things 4 --most-objects 4"

SCENES="$WORLD --with-choices 0" TRAIN=30000 QUESTIONS=2 GRID=6 VQ=--local VQ_STEPS=3000 PICTURES=120 make_picture_world $OUT
# shellcheck disable=SC2086
step "scenes with more questions" 600 "$PY" tools/make_scenes.py --out $OUT/more_scenes --size 54 $WORLD \
    --seed 4321 --train 40000 --validation 0 --test 0 --questions 8 --forms tar --workers 2
_data_set $OUT more-questions-train $OUT/more_scenes/train/*.tar --vq $OUT/vq --as conversation
