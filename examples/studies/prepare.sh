#!/usr/bin/env bash
# Data of the studies on the picture world, in runs/study: 30,000 scenes with sixteen questions each, and their
# benchmarks. Equal objects look equal, so that small models learn shapes and places sooner.
#
#   bash examples/studies/prepare.sh      some ten minutes on two CPU cores; what is complete is not made again
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../_setup.sh"
# shellcheck source-path=SCRIPTDIR source=../_picture_world.sh
source examples/_picture_world.sh

# For looking longest at what a small model can learn,
VARIATION=0 TRAIN=30000 QUESTIONS=16 VQ_STEPS=6000 PICTURES=200 make_picture_world runs/study
# and for methods against one another, pictures with three questions each: rows that are mostly images, as they are where
# token reduction saves much.
step "pictures with three questions" 600 "$PY" tools/make_scenes.py --out runs/study/scenes_few --size 54 \
    --train 30000 --variation 0 --questions 3 --forms tar --workers 2
for split in train validation; do
    _data_set runs/study "few-questions-$split" runs/study/scenes_few/$split/$split-*.tar --vq runs/study/vq \
        --as conversation
done
