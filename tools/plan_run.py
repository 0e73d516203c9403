"""Plan a run: which parallel layouts fit on a number of GPUs, how long they take, and what a run costs.

For a configuration and N GPUs of a kind: memory of each pipeline stage, predicted step time and MFU of every layout
that fits, the best of them as YAML for pretrain_unified.py, why its neighbours are worse, and for a number of tokens
days, GPU hours and cost. The data is that of the configuration, where it is there, or a mix of documents.

The figures are predictions from data sheets; --calibrate measures the machine that it runs on.
"""

import argparse
import math
import shlex
import sys
from pathlib import Path

from megatron_ext import config_file
from megatron_ext.command_line import parser, progress, run
from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.files import write_json, write_text
from megatron_ext.planning import report
from megatron_ext.planning.devices import DEVICES, GB, Device, device_of
from megatron_ext.planning.inputs import with_vocabulary, workload_of
from megatron_ext.planning.search import Search
from megatron_ext.training.config_checks import validate
from megatron_ext.vocabulary import padded_size

EXAMPLE = """python tools/plan_run.py --config examples/configs/llama-2-7b.yaml plan.preset=himix_hmgen_share_partial \\
      --gpus 64 --device h100 --tokens 100e9 --price 2.5 --out layout.yaml
  python tools/plan_run.py --calibrate h100.json     # on one GPU of the cluster; then --calibration h100.json"""


def main() -> None:
    options = _arguments()
    if options.calibrate:
        from megatron_ext.planning import calibration  # it loads torch

        numbers = calibration.calibrate(progress)
        write_json(options.calibrate, numbers)
        print(calibration.describe(numbers))
        return
    settings = [*options.config, *options.overrides]  # argparse gives everything after --config to it
    config = config_file.load(Config, [s for s in settings if "=" not in s], [s for s in settings if "=" in s])
    device = device_of(options.device, options.calibration)
    parallel = config.parallel
    validate(config, parallel.tensor * parallel.context * parallel.pipeline)
    config, size, vocabulary = with_vocabulary(config)
    if options.vocabulary:
        size, vocabulary = options.vocabulary, "of --vocabulary"
    workload, source = workload_of(config, options.mix)
    search = Search(config, workload, lambda c: padded_size(size, c.parallel.tensor), device)
    given = None
    if options.as_configured:
        validate(config, options.gpus)
        given = search.candidate(config, options.gpus)
    feasible, misses = search.run(options.gpus, lambda items: progress(items, desc="layouts"))
    reliability = report.Reliability(options.save_stall, 60 * options.restart_minutes)
    vocabulary = f"{size} ids, {vocabulary}"
    calibrated = options.calibration is not None
    lines = report.assumptions(config, device, source, vocabulary, calibrated, options.gpus, reliability)
    numbers = {"gpus": options.gpus, "device": options.device, "vocabulary": size, "assumptions": lines}
    if given:
        numbers["as_configured"] = report.layout_numbers(given)
    if not feasible:
        nearest = misses[0]
        numbers["nearest_miss"] = report.layout_numbers(nearest)
        if options.json:
            write_json(options.json, numbers)
        raise UserError(_nothing_fits(nearest, options.gpus, device))
    best = search.recommended(feasible)
    cost = report.run_numbers(best, workload, options.gpus, options.tokens, options.price, reliability)
    why = report.neighbours(best, feasible, misses, device)
    numbers |= {"best": report.layout_numbers(best), "run": cost, "neighbours": why}
    numbers |= {"fitting": len(feasible), "layouts": [report.layout_numbers(c) for c in feasible[: report.LISTED]]}
    print(f"{len(feasible)} of {len(feasible) + len(misses)} layouts fit on {options.gpus} x {device.name}")
    print(report.table(feasible, options.gpus, given))
    print("\n" + report.describe_run(best, cost, options.gpus))
    print("\nwhy not another:", *why, sep="\n  ")
    print("\nassumptions:", *lines, sep="\n  ")
    if options.out:
        command = f"python tools/plan_run.py {shlex.join(sys.argv[1:])}"
        write_text(options.out, report.yaml_of(best, cost, options.gpus, device, source, command))
        files = " ".join(f for f in options.config if "=" not in f)
        print(f"\nwritten: {options.out}, for pretrain_unified.py --config {files} {options.out}")
        variables = report.launch_variables(best.config)
        print(f'under Slurm: CONFIG="{files} {options.out}" {variables} sbatch ... examples/run_unified_tp4_pp2.sh')
    if options.json:
        write_json(options.json, numbers)


def _nothing_fits(nearest, devices: int, device: Device) -> str:
    parallel, training = nearest.config.parallel, nearest.config.training
    return (
        f"no layout fits on {devices} x {device.name}: the nearest (parallel.tensor={parallel.tensor} "
        f"parallel.context={parallel.context} parallel.pipeline={parallel.pipeline} "
        f"training.micro_batch_size={training.micro_batch_size} training.recompute={training.recompute}) needs "
        f"{nearest.worst / GB:.1f} GB of {device.limit / GB:.1f} GB; take more devices, or larger ones"
    )


def _arguments() -> argparse.Namespace:
    arguments = parser(__doc__, EXAMPLE)
    arguments.add_argument("--config", nargs="+", default=[], metavar="FILE", help="as for pretrain_unified.py")
    arguments.add_argument("overrides", nargs="*", metavar="section.key=value", help="as for pretrain_unified.py")
    arguments.add_argument("--gpus", type=int, default=8, metavar="N", help="devices in all (default: 8)")
    arguments.add_argument("--device", choices=DEVICES, default="h100", help="kind of device (default: h100)")
    arguments.add_argument("--tokens", type=float, default=100e9, metavar="N", help="to train on (default: 100e9)")
    arguments.add_argument("--price", type=float, metavar="P", help="of a GPU hour, to compute the cost")
    arguments.add_argument(
        "--mix",
        metavar="DOCUMENTS",
        help="the data, as for tools/flops.py (default: data.train, or a mix of its tasks where it is not there)",
    )
    arguments.add_argument("--vocabulary", type=int, metavar="SIZE", help="ids (default: that of data.vocabulary)")
    arguments.add_argument(
        "--save-stall",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="by which a save holds training up (default: 5)",
    )
    arguments.add_argument(
        "--restart-minutes", type=float, default=10.0, metavar="N", help="from a fault to training (default: 10)"
    )
    arguments.add_argument(
        "--as-configured", action="store_true", help="also plan the configuration's own layout, as the first line"
    )
    arguments.add_argument("--out", type=Path, metavar="FILE", help="write the recommended layout as YAML")
    arguments.add_argument("--calibration", type=Path, metavar="FILE", help="figures that --calibrate measured")
    arguments.add_argument(
        "--calibrate",
        type=Path,
        nargs="?",
        const=Path("calibration.json"),
        metavar="FILE",
        help="only measure the present machine, in about a minute, into FILE (default: calibration.json)",
    )
    options = arguments.parse_intermixed_args()
    if options.gpus < 1:
        arguments.error(f"--gpus {options.gpus}: must be at least 1")
    for name in ("tokens", "save_stall"):
        if not 0 < getattr(options, name) < math.inf:
            arguments.error(f"--{name.replace('_', '-')} {getattr(options, name):g}: must be above 0")
    return options


if __name__ == "__main__":
    run(main)
