#!/usr/bin/env bash
#SBATCH --job-name=unified
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# Train with tensor parallelism 4 and pipeline parallelism 2 (8 GPUs hold one replica; more GPUs add replicas).
#
#   CONFIG=my.yaml OUTPUT=runs/my sbatch --nodes=4 examples/run_unified_tp4_pp2.sh      under Slurm, one task per GPU
#   bash examples/run_unified_tp4_pp2.sh training.iterations=100      on this machine, under torchrun
#   TP=2 PP=2 NPROC=4 CONFIG=examples/configs/tiny.yaml bash examples/run_unified_tp4_pp2.sh     without any GPU
#
# A job that must stop (end of its time, preemption) saves a checkpoint, is requeued and resumes. Arguments are
# overrides, section.key=value. Environment variables, which sbatch passes on by default (--export):
#
#   CONFIG        YAML files, space-separated; later ones over earlier   examples/configs/llama-2-7b.yaml
#   OUTPUT        folder of the run                                      runs/<last config's name>-tp<TP>-pp<PP>
#   TP PP         tensor and pipeline parallel sizes; they always        4 2; the rest is data parallelism
#                 replace those of the configuration
#   VPP           virtual pipeline parallel size                         that of the configuration
#   MICRO_BATCH GLOBAL_BATCH ITERATIONS TIME_LIMIT (minutes)             those of the configuration
#   EXTRA         more overrides, space-separated
#   PYTHON        interpreter                                            .venv/bin/python if there is one, or python3
#   NPROC         without Slurm: processes on this machine               its GPUs; without any, TP x PP
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT   without Slurm, several machines: run this on each of them
#   SRUN          under Slurm: more arguments for srun, such as --container-image=...
#   MAX_RESTARTS  under Slurm: most requeues of the job                  100
#   ROOT          the repository, if it is neither that of the script nor the folder of submission
set -euo pipefail

# sbatch runs a copy of this script, so its location may not be in the repository.
for ROOT in "${ROOT:-}" "$(dirname "${BASH_SOURCE[0]}")/.." "${SLURM_SUBMIT_DIR:-.}" "${SLURM_SUBMIT_DIR:-.}/.."; do
    [[ -n $ROOT && -f $ROOT/pretrain_unified.py ]] && break
done
cd "$ROOT"
if [[ ! -f pretrain_unified.py ]]; then
    echo "error: pretrain_unified.py not found; submit from the repository or set ROOT" >&2
    exit 1
fi
[[ -n ${PYTHON:-} ]] || PYTHON=$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)

TP=${TP:-4} PP=${PP:-2}
read -ra configs <<<"${CONFIG:-examples/configs/llama-2-7b.yaml}"
OUTPUT=${OUTPUT:-runs/$(basename "${configs[-1]}" .yaml)-tp$TP-pp$PP}
overrides=("output=$OUTPUT" "parallel.tensor=$TP" "parallel.pipeline=$PP")
override() { [[ -z $2 ]] || overrides+=("$1=$2"); }
override parallel.virtual_pipeline "${VPP:-}"
override training.micro_batch_size "${MICRO_BATCH:-}"
override training.global_batch_size "${GLOBAL_BATCH:-}"
override training.iterations "${ITERATIONS:-}"
override lifecycle.time_limit_minutes "${TIME_LIMIT:-}"
read -ra extra <<<"${EXTRA:-}"
train=(pretrain_unified.py "${overrides[@]}" ${extra[@]+"${extra[@]}"} "$@" --config "${configs[@]}")

# Tensor-parallel communication overlaps with compute only if kernels are queued in order.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Micro-batches differ in size; segments that grow leave no holes between them. Newer torch has the second name.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-$PYTORCH_CUDA_ALLOC_CONF}

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
    NPROC=${NPROC:-$((gpus > 0 ? gpus : TP * PP))}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((n = $(nproc) / NPROC) > 0 ? n : 1))}
    # torchrun passes these signals on to its workers and gives them this time to save.
    export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240
    rendezvous=(--standalone)
    if ((${NNODES:-1} > 1)); then
        : "${NODE_RANK:?NNODES is over 1: set NODE_RANK}" "${MASTER_ADDR:?NNODES is over 1: set MASTER_ADDR}"
        rendezvous=(--nnodes "$NNODES" --node_rank "$NODE_RANK"
            --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
    fi
    exec "$PYTHON" -m torch.distributed.run "${rendezvous[@]}" --nproc_per_node "$NPROC" "${train[@]}"
fi

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS PYTHON
echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), ${SLURM_JOB_NUM_NODES:-1} node(s), output $OUTPUT"
read -ra srun <<<"${SRUN:-}"
status=0
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 ${srun[@]+"${srun[@]}"} bash -c '
    trap "" USR1  # ignored until the program handles it
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec "$PYTHON" "$@"' rank "${train[@]}" || status=$?

if ((status)); then
    echo "training failed with exit code $status; not requeued" >&2
    exit "$status"
fi
if [[ -f $OUTPUT/FINISHED ]]; then
    echo "complete: $OUTPUT"
elif ((${SLURM_RESTART_COUNT:-0} >= ${MAX_RESTARTS:-100})); then
    echo "stopped before the end and not requeued: MAX_RESTARTS is ${MAX_RESTARTS:-100}" >&2
    exit 1
else
    echo "stopped before the end: job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
