"""Check the GPU path in one run on one GPU: its results, its speed, and where the time goes. Started by gpu_check.sh.

One folder holds the results: gpu_check.json, written after every step and during it; gpu.md, the same as a page; and
gpu_check.log. Complete steps are not repeated.
"""

import argparse
import signal
import sys
import tempfile
from pathlib import Path

import torch

from gpu import runner
from gpu.machine import machine
from gpu.page import page
from gpu.records import FAILED, Context, Record, read, write_machine
from gpu.steps import STEPS, Step, missed
from megatron_ext import command_line, files
from megatron_ext.errors import UserError


def main() -> None:
    arguments = parse_arguments()
    file = arguments.results / "gpu_check.json"
    if arguments.page:
        return files.write_text(arguments.page, page(read(file)))
    steps = [step for step in STEPS if step.name in arguments.only]
    if arguments.step:
        return runner.measure({step.name: step for step in STEPS}[arguments.step], context_of(arguments))
    if not torch.cuda.is_available() and not arguments.rehearse:
        raise UserError("no GPU here; --rehearse runs the same steps at tiny sizes on a CPU")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the running step, too
    write_machine(file, machine())
    ended: dict[str, Record] = {}

    def after(step: Step, record: Record) -> None:
        ended[step.name] = record
        files.write_text(arguments.results / "gpu.md", page(read(file)))
        print(describe(step, record), flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        arguments.scratch = Path(scratch)
        runner.run(steps, context_of(arguments), arguments.minutes, after)
    print(f"{arguments.results / 'gpu.md'}; what the steps printed: {file.with_suffix('.log')}")
    if failed := [name for name, record in ended.items() if record.status == FAILED]:
        raise UserError(f"failed: {', '.join(failed)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_check.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  bash benchmarks/gpu_check.sh runs/gpu --references runs/rehearsal/references",
    )
    names = [step.name for step in STEPS]
    parser.add_argument("results", type=Path, nargs="?", default=Path("runs/gpu_check"), metavar="RESULTS")
    parser.add_argument("--rehearse", action="store_true", help="the same steps at tiny sizes on a CPU")
    parser.add_argument("--references", type=Path, metavar="FOLDER", help="the CPU's; default: RESULTS/references")
    parser.add_argument("--only", type=lambda text: text.split(","), default=names, help=f"of {','.join(names)}")
    parser.add_argument("--minutes", type=float, default=8.8, help="for all steps together (default 8.8)")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write RESULTS as a page, and run nothing")
    parser.add_argument("--step", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.only if name not in names]:
        parser.error(f"unknown step {unknown[0]!r}; known: {', '.join(names)}")
    arguments.results = arguments.results.absolute()
    return arguments


def context_of(arguments: argparse.Namespace) -> Context:
    references = arguments.references or arguments.results / "references"
    return Context(arguments.results, references.absolute(), arguments.scratch, arguments.rehearse)


def describe(step: Step, record: Record) -> str:
    """How a step ended, and the aims that it missed."""
    outcome = f"{step.name}: {record.status}" + (f": {record.reason}" if record.reason else f", {record.seconds:.0f} s")
    slow = [] if record.rehearsal or record.status == FAILED else missed(step.figures, record.figures)
    return "; ".join([outcome, *(f"missed: {line}" for line in slow)])


if __name__ == "__main__":
    command_line.run(main)
