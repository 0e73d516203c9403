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

scenes=(--size 54 --variation 0 --forms tar --workers 2)

VARIATION=0 TRAIN=30000 QUESTIONS=16 VQ_STEPS=6000 PICTURES=200 make_picture_world runs/study
# What is learnt last: examples/configs/picture_world_relations.yaml.
step "scenes with questions about relations" 600 "$PY" tools/make_scenes.py --out runs/study/scenes_hard \
    "${scenes[@]}" --seed 4321 --train 24000 --validation 0 --test 0 --questions 16 --with-choices 0.2 \
    --kinds relation direction place layout most statement comparison
_data_set runs/study hard-questions-train runs/study/scenes_hard/train/*.tar --vq runs/study/vq --as conversation
# For methods against one another: rows that are mostly images, as they are where token reduction saves much.
step "scenes with three questions" 600 "$PY" tools/make_scenes.py --out runs/study/scenes_few \
    "${scenes[@]}" --train 30000 --test 0 --questions 3
for split in train validation; do
    _data_set runs/study "few-questions-$split" "runs/study/scenes_few/$split"/*.tar --vq runs/study/vq --as conversation
done
