#!/usr/bin/env bash
#SBATCH --job-name=preprocess
#SBATCH --array=1-16
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=12
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.log
#
# Preprocess a data set on many machines: each task of the array does its share, one more job joins the parts.
#
#   export OUT=data/train VQ=checkpoints/janus-pro-1b VOCABULARY=runs/vocabulary
#   job=$(sbatch --parsable examples/preprocess_slurm_array.sh data/shards/*.tar)
#   sbatch --dependency=afterok:$job --array=1 --gpus-per-task=0 --export=ALL,MERGE=1 examples/preprocess_slurm_array.sh
#
# The array sets the number of tasks (here 16; sbatch --array=1-64 for more). A stopped task resumes when it is requeued
# or submitted again. All tasks write to OUT.parts/, on a shared file system. Arguments go to tools/preprocess_vq.py:
# input files and options. Environment variables:
#
#   OUT         prefix of the data set
#   VQ          folder of the VQ tokenizer; empty for plain text
#   VOCABULARY  folder of the vocabulary
#   MERGE       1 to join the parts of the array
#   PYTHON      interpreter                                .venv/bin/python if there is one, or python3
#   ROOT        the repository, if it is neither that of the script nor the folder of submission
set -euo pipefail

# sbatch runs a copy of this script, so its location may not be in the repository.
for ROOT in "${ROOT:-}" "$(dirname "${BASH_SOURCE[0]}")/.." "${SLURM_SUBMIT_DIR:-.}" "${SLURM_SUBMIT_DIR:-.}/.."; do
    [[ -n $ROOT && -f $ROOT/tools/preprocess_vq.py ]] && break
done
if [[ ! -f $ROOT/tools/preprocess_vq.py ]]; then
    echo "error: tools/preprocess_vq.py not found; submit from the repository or set ROOT" >&2
    exit 1
fi
ROOT=$(cd "$ROOT" && pwd)
[[ -n ${PYTHON:-} ]] || PYTHON=$([[ -x $ROOT/.venv/bin/python ]] && echo "$ROOT/.venv/bin/python" || echo python3)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
: "${OUT:?set OUT to the prefix of the data set}"

tool=("$PYTHON" "$ROOT/tools/preprocess_vq.py" --out "$OUT")
if [[ ${MERGE:-} == 1 ]]; then
    exec "${tool[@]}" --merge
fi
: "${VOCABULARY:?set VOCABULARY to the folder of the vocabulary}"
: "${SLURM_ARRAY_TASK_ID:?run this with sbatch, as a job array}"
shard=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN + 1))/$SLURM_ARRAY_TASK_COUNT
exec "${tool[@]}" --vocabulary "$VOCABULARY" ${VQ:+--vq "$VQ"} --shard "$shard" "$@"
