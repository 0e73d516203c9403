#!/usr/bin/env bash
# Data of the studies on the picture world, in runs/study: 20,000 scenes with sixteen questions each, and their benchmarks.
#
#   bash examples/studies/prepare.sh      some ten minutes on two CPU cores; what is complete is not made again
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../_setup.sh"
# shellcheck source-path=SCRIPTDIR source=../_picture_world.sh
source examples/_picture_world.sh

TRAIN=20000 QUESTIONS=16 VQ_STEPS=4000 PICTURES=100 make_picture_world runs/study
