"""Seconds of training steps against what ``tools/plan_run.py`` predicts after calibration, on one process.

    python benchmarks/plan_time.py --json FILE

The machine is calibrated first (a minute). Then whole steps are timed under several plans and sizes of micro-batches,
on a CPU in seconds of the process. ``error`` compares seconds; ``relative error`` the ratio of a case to the first one,
which is what a plan chooses by.
"""

import statistics
import time
from pathlib import Path

import torch

from megatron_ext import command_line, config_file, cpu, distributed, files
from megatron_ext.config import Config
from megatron_ext.planning import calibration
from megatron_ext.planning.devices import device_of
from megatron_ext.planning.step_time import layer_costs, step_time
from megatron_ext.planning.workload import Workload
from megatron_ext.routing.plan import Plan
from plan_memory import VOCABULARY, rows_of_documents

BASE = [
    "model.num_layers=4",
    "model.hidden_size=512",
    "model.num_attention_heads=8",
    "data.sequence_length=512",
    "training.global_batch_size=4",
    "training.iterations=1000",
]
GPU = ["model.num_layers=16", "model.hidden_size=2048", "data.sequence_length=4096", "training.precision=bf16"]
CASES = {
    "dense, 1 row": ["training.micro_batch_size=1"],
    "dense, 4 rows": ["training.micro_batch_size=4"],
    "dense, recomputed": ["training.micro_batch_size=4", "training.recompute=full"],
    "HiMix, 1 row": ["training.micro_batch_size=1", "plan.preset=himix"],
    "HiMix, 4 rows": ["training.micro_batch_size=4", "plan.preset=himix"],
    "HMGen, 4 rows": ["training.micro_batch_size=4", "plan.preset=hmgen"],
    "share partial, 4 rows": ["training.micro_batch_size=4", "plan.preset=himix_hmgen_share_partial"],
}


def measure(config: Config, repeats: int) -> float:
    """Median seconds of a step."""
    from training_step.ours import OurStep

    batch = rows_of_documents(config.training.global_batch_size, config.data.sequence_length)
    step, seconds = OurStep(config, VOCABULARY, batch.tensors()), []
    clock = calibration.cpu_clock if cpu.available() else time.perf_counter
    step()
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = clock()
        step()
        torch.cuda.synchronize()
        seconds.append(clock() - start)
    return statistics.median(seconds)


def predict(config: Config, device) -> float:
    """Seconds of a step, as predicted."""
    batch = rows_of_documents(config.training.global_batch_size, config.data.sequence_length)
    workload = Workload.of_batch(batch, Plan.from_config(config))
    micro_batches = workload.micro_batches(workload.neighbours(config.training.micro_batch_size))
    costs = layer_costs(config, workload, VOCABULARY, device, micro_batches)
    return step_time(config, workload, VOCABULARY, 1, device, costs).seconds


def main() -> None:
    parser = command_line.parser(__doc__.splitlines()[0], "python benchmarks/plan_time.py --repeats 5")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    numbers = calibration.calibrate()
    print(calibration.describe(numbers))
    file = Path(arguments.json or "plan_time.json").with_suffix(".calibration.json")
    files.write_json(file, numbers)
    device = device_of("cpu" if cpu.available() else "h100", file)
    base = BASE if cpu.available() else [*BASE, *GPU]
    distributed.initialize(config_file.load(Config, [], base))
    results = {}
    for name, settings in CASES.items():
        config = config_file.load(Config, [], [*base, *settings])
        results[name] = {"measured": measure(config, arguments.repeats), "predicted": predict(config, device)}
    first = next(iter(results.values()))
    print("| case | measured, s | predicted | error | relative error |\n| --- | --- | --- | --- | --- |")
    for name, result in results.items():
        result["error"] = result["predicted"] / result["measured"] - 1
        result["relative_error"] = (1 + result["error"]) / (1 + first["error"]) - 1
        cells = [f"{result[key]:.3f}" for key in ("measured", "predicted")]
        cells += [f"{result[key]:+.0%}" for key in ("error", "relative_error")]
        print("| " + " | ".join([name, *cells]) + " |")
    if arguments.json:
        files.write_json(arguments.json, {"calibration": numbers} | results)
    distributed.shut_down()


if __name__ == "__main__":
    command_line.run(main)
