"""Run the study of deeper models on one GPU in under nine minutes. Started by gpu_study.sh.

Many small runs share the GPU: their processes fork from one that has imported torch and Megatron-Core. Runs go seed by
seed, so a study that is cut short has whole seeds; a second call resumes it. RESULTS is a study's folder
(docs/studies.md), with the data in world.tar.xz and the machine in machine.json.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from gpu.machine import machine
from gpu_study import order, page, preparation, rates, sharing
from megatron_ext import command_line, config_file, files
from megatron_ext.errors import UserError
from megatron_ext.study import grid, scheduler, status, steps, study_file
from megatron_ext.study.grid import StudyRun
from megatron_ext.study.study_file import Study

FILES = Path(__file__).with_name("gpu_study")
REHEARSAL = FILES / "rehearsal.yaml"
REHEARSAL_JOBS = 2


def main() -> None:
    arguments = parse_arguments()
    results: Path = arguments.results
    if arguments.page:
        preparation.unpack_world(results)
        return files.write_text(arguments.page, page.page(*runs_of(study_file.read(results / "study.yaml"))))
    if arguments.prepare or arguments.rehearse:
        packed = preparation.make_world(results, arguments.rehearse)
        if arguments.learning_rates:
            rates.carry_over(arguments.learning_rates, results)
        print(f"{packed}: {packed.stat().st_size / 2**20:.1f} MB", flush=True)
    study, runs = runs_of(write_study(results, arguments.rehearse))
    steps.check(runs, study.evaluation)
    print(f"{results}: {len(runs)} runs of {study.name}", flush=True)
    if not arguments.prepare:
        execute(arguments, study, runs)


def runs_of(study: Study) -> tuple[Study, list[StudyRun]]:
    """A study and its runs in order."""
    return study, order.by_share_of_seeds(study, grid.runs(study, rates.rates(study)))


def execute(arguments: argparse.Namespace, study: Study, runs: list[StudyRun]) -> None:
    """Run what is not finished, for as long as there is time, and record the machine."""
    on_gpu = machine()
    if on_gpu["GPU"] == "none" and not arguments.rehearse:
        raise UserError("no GPU here; --rehearse runs the same programs at tiny sizes on a CPU")
    started = time.monotonic()
    with sharing.side_by_side(arguments.results) as (start, has_mps):
        rates_of_trial = {} if arguments.jobs else sharing.trial(numbers(arguments), start, arguments.results / "trial")
        jobs = arguments.jobs or sharing.best_number(rates_of_trial) or max(numbers(arguments))
        print(f"runs at once: {jobs}", flush=True)
        # The scheduler passes SIGTERM on to the programs, which save and exit.
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        signal.setitimer(signal.ITIMER_REAL, max(0.01, 60 * arguments.minutes - (time.monotonic() - started)))
        try:
            scheduler.execute(runs, study.evaluation, jobs, start=start)
        except UserError as stopped:
            print(stopped, file=sys.stderr)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    calls = arguments.results / "machine.json"
    before = files.read_json(calls) if calls.is_file() else []
    here = on_gpu | {"date": time.strftime("%Y-%m-%d"), "jobs": jobs, "rehearsal": arguments.rehearse}
    here["MPS"] = "yes" if has_mps else "no"
    if rates_of_trial:
        steps_per_second = (f"{rate:.0f} with {number}" for number, rate in rates_of_trial.items())
        here["steps a second of the stand-in, by programs at once"] = ", ".join(steps_per_second)
    files.write_json(calls, [*before, here | {"seconds": round(time.monotonic() - started)}])
    _, counts = status.table(study, runs)
    print(counts)
    if failed := status.failed(study, runs):
        raise UserError(f"failed: {', '.join(failed)}")


def numbers(arguments: argparse.Namespace) -> list[int]:
    """How many runs at once are tried; each needs most of a core."""
    most = REHEARSAL_JOBS if arguments.rehearse else max(1, (os.cpu_count() or 4) - 3)
    return sorted({1, min(4, most), most})


def write_study(results: Path, rehearsal: bool) -> Study:
    """The study over the data in ``results``, also in ``RESULTS/study.yaml``."""
    file = results / "study.yaml"
    files.write_text(file, page.STUDY.read_text().replace("{WORLD}", str(preparation.unpack_world(results))))
    study = study_file.read(file, *([REHEARSAL] if rehearsal else []))
    study.output = str(results)
    config_file.write_yaml(file, study)
    return study


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_study.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  bash benchmarks/gpu_study.sh runs/gpu_study --prepare\n"
        "  bash benchmarks/gpu_study.sh runs/gpu_study",
    )
    parser.add_argument("results", type=Path, nargs="?", default=Path("runs/gpu_study"), metavar="RESULTS")
    parser.add_argument("--minutes", type=float, default=8.5, help="after which runs save and stop (default 8.5)")
    parser.add_argument("--learning-rates", type=Path, metavar="FILE", help="with --prepare: of another study's search")
    parser.add_argument("--jobs", type=int, help="runs at once (default: what a trial finds best)")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--prepare", action="store_true", help="only make and pack the data, and plan the runs")
    action.add_argument("--rehearse", action="store_true", help="prepare and run the same at tiny sizes on a CPU")
    action.add_argument("--page", type=Path, metavar="FILE", help="write RESULTS as a page, and run nothing")
    return parser.parse_args()


if __name__ == "__main__":
    command_line.run(main)
