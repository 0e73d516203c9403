#!/usr/bin/env bash
# Data of examples/studies/picture_world.yaml, in runs/small_world: scenes of few kinds of things, which models of a
# million parameters learn to see within minutes, and rows that are mostly images, as they are where token reduction
# saves much.
#
#   bash examples/studies/prepare.sh      some five minutes on two CPU cores; what is complete is not made again
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../_setup.sh"
# shellcheck source-path=SCRIPTDIR source=../_picture_world.sh
source examples/_picture_world.sh

SCENES="--variation 0 --kinds-of-things 4 --most-objects 4 --with-choices 0" TRAIN=30000 QUESTIONS=4 \
    CODES=512 VQ_STEPS=3000 PICTURES=120 make_picture_world runs/small_world
