"""How long training stands still for a checkpoint: written at once, in the background, on a local disk.

    python benchmarks/checkpoint_stall.py --json benchmarks/results/checkpoint_stall.json

Trains a model of 113 M parameters in bf16 on two replicas with the distributed optimizer, and reads checkpoint_seconds
in metrics.jsonl: all time that a save takes from training, such as for copies, for gathering the optimizer's state, for
an earlier save, and for completing it.
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from gpu.tiny_run import write_config
from megatron_ext import command_line, files
from megatron_ext.errors import UserError
from megatron_ext.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
MODEL = (
    "model.num_layers=12",
    "model.hidden_size=768",
    "model.ffn_hidden_size=3072",
    "model.num_attention_heads=12",
    "plan.preset=dense",
)
RUN = (
    "training.micro_batch_size=1",
    "training.global_batch_size=2",
    "training.precision=bf16",
    "parallel.distributed_optimizer=true",
    "checkpoint.keep=1",
    "logging.tensorboard=false",
)
INTERVAL = 4
"""Iterations between saves: enough for a save in the background to end before the next."""
KINDS = {
    "synchronous": [f"checkpoint.interval={INTERVAL}"],
    "asynchronous": [f"checkpoint.interval={INTERVAL}", "checkpoint.asynchronous=true"],
    "local": [f"checkpoint.local_interval={INTERVAL}", "checkpoint.local={folder}/local"],
}


def main() -> None:
    parser = command_line.parser(__doc__.splitlines()[0], "python benchmarks/checkpoint_stall.py --saves 3")
    parser.add_argument("--saves", type=int, default=3, help="of each kind; the median counts")
    parser.add_argument("--processes", type=int, default=2, help="replicas")
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        config = write_config(Path(folder), rehearsal=True)
        for kind, settings in KINDS.items():
            results[kind] = _stall(config, kind, settings, arguments)
            print(f"{kind}: {results[kind]['seconds']:.2f} s (step {results[kind]['step_seconds']:.2f} s)", flush=True)
    if arguments.json:
        files.write_json(arguments.json, results)


def _stall(config: Path, kind: str, settings: list[str], arguments) -> dict:
    """Median stall of a save, in seconds."""
    output = config.parent / kind
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", arguments.processes]
    iterations = INTERVAL * (arguments.saves + 1)
    command = [*launch, "pretrain_unified.py", "--config", config, f"output={output}", *MODEL, *RUN]
    command += [f"training.iterations={iterations}", *(s.format(folder=config.parent) for s in settings)]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{kind}: {done.stdout[-500:]}{done.stderr[-1500:]}")
    records = read_metrics(output / "metrics.jsonl")
    # A save after iteration n is logged with n + 1; a save in the background is completed a few iterations later.
    rounds = [records[first : first + INTERVAL] for first in range(INTERVAL, iterations, INTERVAL)]
    stalls = [sum(record["checkpoint_seconds"] for record in saved) for saved in rounds]
    return {
        "seconds": statistics.median(stalls),
        "all": stalls,
        "step_seconds": statistics.median(record["step_seconds"] for record in records),
    }


if __name__ == "__main__":
    command_line.run(main)
