#!/usr/bin/env bash
# Data of examples/configs/picture_world.yaml, in runs/study: 30,000 scenes with sixteen questions each, further ones with
# questions about what is learnt last, and benchmarks. Equal objects look equal, so that small models learn to see sooner.
#
#   bash examples/prepare_picture_world.sh     some ten minutes on two CPU cores; what is complete is not made again
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
# shellcheck source-path=SCRIPTDIR source=_picture_world.sh
source examples/_picture_world.sh

SCENES="--variation 0" TRAIN=30000 QUESTIONS=16 VQ_STEPS=6000 PICTURES=200 make_picture_world runs/study
step "scenes with questions about relations" 600 "$PY" tools/make_scenes.py --out runs/study/scenes_hard --size 54 \
    --variation 0 --forms tar --workers 2 --seed 4321 --train 24000 --validation 0 --test 0 --questions 16 \
    --with-choices 0.2 --kinds relation direction place layout most statement comparison
_data_set runs/study hard-questions-train runs/study/scenes_hard/train/*.tar --vq runs/study/vq --as conversation
