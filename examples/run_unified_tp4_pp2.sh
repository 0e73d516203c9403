#!/usr/bin/env bash
#SBATCH --job-name=unified
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# Train with tensor parallelism 4 and pipeline parallelism 2 (8 GPUs hold one replica; more GPUs add replicas).
#
#   CONFIG=my.yaml OUTPUT=runs/my sbatch --nodes=4 examples/run_unified_tp4_pp2.sh    under Slurm
#   bash examples/run_unified_tp4_pp2.sh training.iterations=100      on this machine
#   TP=2 PP=2 NPROC=4 CONFIG=examples/configs/tiny.yaml bash examples/run_unified_tp4_pp2.sh     without any GPU
#
# One launcher (torchrun) on each machine starts a rank per GPU. Ranks that fail are started again by it, from the newest
# checkpoint. A job that must stop (end of its time, preemption) saves a checkpoint, is requeued and resumes; so does a
# job that failed after it had saved a checkpoint, or because a machine was lost. Arguments are overrides,
# section.key=value. docs/cluster.md says more.
# Environment variables, which sbatch passes on by default (--export):
#
#   CONFIG        YAML files, space-separated; later ones over earlier   examples/configs/llama-2-7b.yaml
#   OUTPUT        folder of the run                                      runs/<last config's name>-tp<TP>-pp<PP>
#   TP PP         tensor and pipeline parallel sizes; they always        4 2; the rest is data parallelism
#                 replace those of the configuration
#   VPP CP        virtual pipeline and context parallel sizes            those of the configuration
#   MICRO_BATCH GLOBAL_BATCH ITERATIONS TIME_LIMIT (minutes)             those of the configuration
#   EXTRA         more overrides, space-separated
#   PYTHON        interpreter                                            .venv/bin/python if there is one, or python3
#   NPROC         ranks on each machine                                  its GPUs; without any, TP x PP
#   RESTARTS      how often failed ranks are started again               3
#   NNODES        number of machines, or MIN:MAX: the run goes on with   under Slurm those of the job, else 1
#                 as many as there are
#   MASTER_ADDR MASTER_PORT   without Slurm, several machines: one of them, and a free port there (29500); run this on
#                 each of them
#   SRUN          under Slurm: more arguments for srun, such as --container-image=...
#   MAX_RESTARTS  under Slurm: most requeues of the job                  100
#   MAX_LOST      under Slurm: most requeues in a row because machines   3
#                 were lost, without a new checkpoint
#   ROOT          the repository, if it is neither that of the script nor the folder of submission
set -euo pipefail

# Under Slurm, signals reach this script first and are remembered, however early they come.
stop=
if [[ -n ${SLURM_JOB_ID:-} ]]; then
    trap 'stop=USR1' USR1
    trap 'stop=TERM' TERM
fi

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
read -ra extra <<<"${EXTRA:-}"
for argument in ${extra[@]+"${extra[@]}"} "$@"; do
    [[ $argument != output=* ]] || OUTPUT=${argument#output=}
done
OUTPUT=${OUTPUT:-runs/$(basename "${configs[-1]}" .yaml)-tp$TP-pp$PP}
overrides=("output=$OUTPUT" "parallel.tensor=$TP" "parallel.pipeline=$PP")
override() { [[ -z $2 ]] || overrides+=("$1=$2"); }
override parallel.virtual_pipeline "${VPP:-}"
override parallel.context "${CP:-}"
override training.micro_batch_size "${MICRO_BATCH:-}"
override training.global_batch_size "${GLOBAL_BATCH:-}"
override training.iterations "${ITERATIONS:-}"
override lifecycle.time_limit_minutes "${TIME_LIMIT:-}"
train=(pretrain_unified.py checkpoint.on_damage=older "${overrides[@]}" ${extra[@]+"${extra[@]}"} "$@"
    --config "${configs[@]}")

# Tensor-parallel communication overlaps with compute only if kernels are queued in order.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Micro-batches differ in size; segments that grow leave no holes between them. Newer torch has the second name.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-$PYTORCH_CUDA_ALLOC_CONF}

gpus=${SLURM_GPUS_ON_NODE:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)}
[[ $gpus =~ ^[0-9]+$ ]] || gpus=0
NPROC=${NPROC:-$((gpus > 0 ? gpus : TP * PP))}
cpus=${SLURM_CPUS_PER_TASK:-$(nproc)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > NPROC ? cpus / NPROC : 1))}
NNODES=${NNODES:-${SLURM_JOB_NUM_NODES:-1}}
launch=("$PYTHON" -m megatron_ext.training.launcher --nproc_per_node "$NPROC" --max-restarts "${RESTARTS:-3}")

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    rendezvous=(--standalone)
    [[ $NNODES == 1 ]] || rendezvous=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-id "$OUTPUT"
        --rdzv-endpoint "${MASTER_ADDR:?NNODES is $NNODES: set MASTER_ADDR}:${MASTER_PORT:-29500}")
    exec "${launch[@]}" "${rendezvous[@]}" "${train[@]}"
fi

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
rendezvous=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
    --rdzv-endpoint "$first:$((20000 + SLURM_JOB_ID % 20000))")
newest_checkpoint() { # its name; empty without any
    local name newest=
    for name in "$OUTPUT"/checkpoints/iter_*; do
        [[ $name =~ /iter_[0-9]+$ ]] && newest=${name##*/}
    done
    echo "$newest"
}
say() { echo "$(date +%T) $*"; }
say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), ${SLURM_JOB_NUM_NODES:-1} node(s), output $OUTPUT"
before=$(newest_checkpoint)
read -ra srun <<<"${SRUN:-}"
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # since 22.05 srun does not take it from sbatch
# The launcher's signals are ignored until it is ready for them; the script repeats them until the launchers have ended.
# shellcheck disable=SC2016
srun --ntasks-per-node=1 --no-kill --kill-on-bad-exit=0 ${srun[@]+"${srun[@]}"} bash -c '
    trap "" USR1 TERM
    exec "$@"' launcher "${launch[@]}" "${rendezvous[@]}" "${train[@]}" &
step=$! said=
while kill -0 "$step" 2>/dev/null; do
    if [[ -n $stop ]]; then
        [[ $said == "$stop" ]] || say "SIG$stop: asking the run to save and stop"
        said=$stop
        kill -USR1 "$step" 2>/dev/null || true
        sleep 10 &
    else
        sleep 86400 &
    fi
    wait -n || true # returns when srun or the sleep ends, or a signal arrives
    kill $! 2>/dev/null || true
done
status=0
wait "$step" || status=$?
((status != 138)) || [[ -z $stop ]] || status=0 # SIGUSR1 has ended srun, which had not started anything yet

requeue() {
    if ((${SLURM_RESTART_COUNT:-0} >= ${MAX_RESTARTS:-100})); then
        echo "not requeued: MAX_RESTARTS is ${MAX_RESTARTS:-100}" >&2
        exit 1
    elif ! scontrol show job -o "$SLURM_JOB_ID" | grep -q "JobState=RUNNING"; then
        echo "not requeued: the job was cancelled" >&2
        exit 1
    fi
    say "job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
}

# Requeues of this job in a row that brought no new checkpoint, because machines were lost.
lost_file=$OUTPUT/lost-$SLURM_JOB_ID
[[ $(newest_checkpoint) == "$before" ]] || rm -f "$lost_file"
lost=$(cat "$lost_file" 2>/dev/null || echo 0)

if [[ -f $OUTPUT/FINISHED ]]; then
    rm -f "$lost_file"
    say "complete: $OUTPUT"
elif ((status == 0)); then
    say "stopped before the end"
    requeue
elif ((status != 2 && status != 3)) && [[ $(newest_checkpoint) != "$before" ]]; then
    say "failed with exit code $status after $(newest_checkpoint)"
    requeue
elif ((status == 75 || status > 128)) && ((lost < ${MAX_LOST:-3})); then # hang or lost peer; a launcher was killed
    say "failed with exit code $status: machines are lost, or ranks hang"
    mkdir -p "$OUTPUT"
    echo $((lost + 1)) >"$lost_file"
    requeue
else
    echo "failed with exit code $status; not requeued" >&2
    exit "$status"
fi
