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

VARIATION=0 TRAIN=30000 QUESTIONS=16 VQ_STEPS=6000 PICTURES=200 make_picture_world runs/study
