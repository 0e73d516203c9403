"""Runs one step after the other, each in a process and time box of its own, so a failure stops no other step."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from gpu.logs import last_error
from gpu.records import DONE, FAILED, NOT_RUN, RUNNING, Context, NotRun, Record, of_step
from gpu.steps import Step, missed
from megatron_ext.transformer.transformer_engine import WITHOUT

PROGRAM = Path(__file__).parents[1] / "gpu_check.py"
SHORTEST = 20
"""Seconds; with less time left no step is started."""
SLOWER = 4
"""The time boxes of a rehearsal are longer by this factor, for CPUs of all speeds."""
WAIT_FOR_TE = "WAIT_FOR_TE"
"""Environment variable with the name of a file that exists once a build of Transformer Engine has ended."""


def run(steps: Sequence[Step], context: Context, minutes: float, after: Callable[[Step, Record], None]) -> None:
    """Run the steps that are not done, within ``minutes`` of wall time.

    Args:
        after: called after each step with its record.
    """
    deadline = time.monotonic() + 60 * minutes
    for step in steps:
        record = of_step(context.results / "gpu_check.json", step.name, context.rehearsal)
        if record.status != DONE:
            reason = _why_not(step, context, deadline)
            if reason:
                record.end(NOT_RUN, reason)
            else:
                left = deadline - time.monotonic()
                record = _in_own_process(step, context, min(left, step.seconds * (SLOWER if context.rehearsal else 1)))
        after(step, record)


def measure(step: Step, context: Context) -> None:
    """Run a step in this process and record how it ends."""
    record = of_step(context.results / "gpu_check.json", step.name, context.rehearsal)
    started = time.monotonic()
    try:
        step.measure(context, record)
    except NotRun as reason:
        record.end(NOT_RUN, str(reason), time.monotonic() - started)
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0][:300]
        record.end(FAILED, f"{type(error).__name__}: {first_line}", time.monotonic() - started)
        raise
    else:
        wrong = missed(step.figures, record.figures, everywhere=True)
        record.end(FAILED if wrong else DONE, "; ".join(wrong), time.monotonic() - started)


def _why_not(step: Step, context: Context, deadline: float) -> str:
    """Why a step is not run; empty if it is."""
    if step.needs_transformer_engine:
        import torch  # late: a step's process that needs no torch starts without it

        if not torch.cuda.is_available():
            return "no GPU"
        wait_for_build(deadline - 2 * SHORTEST)
        if problem := import_problem("transformer_engine.pytorch"):
            return f"no Transformer Engine: {problem}"
    return "no time left" if time.monotonic() > deadline - SHORTEST else ""


def wait_for_build(deadline: float) -> None:
    """Wait for the file that :data:`WAIT_FOR_TE` names, if it is set."""
    ended = Path(os.environ.get(WAIT_FOR_TE, "/"))
    while not ended.exists() and time.monotonic() < deadline:
        time.sleep(1)


@functools.cache
def import_problem(module: str) -> str:
    """The error of an import in a fresh process; empty if it works."""
    tried = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True)
    return (tried.stderr.strip().splitlines() or ["it cannot be imported"])[-1][:300] if tried.returncode else ""


def _in_own_process(step: Step, context: Context, seconds: float) -> Record:
    record = of_step(context.results / "gpu_check.json", step.name, context.rehearsal)
    record.end(RUNNING)
    log = record.file.with_suffix(".log")
    command = [sys.executable, str(PROGRAM), str(context.results), "--step", step.name]
    command += ["--references", str(context.references), "--scratch", str(context.scratch)]
    command += ["--rehearse"] * context.rehearsal
    # Two processes of a step, each with a thread per core, would slow one another down.
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if context.rehearsal else {})
    if step.needs_transformer_engine:
        environment.pop(WITHOUT, None)
    started = time.monotonic()
    with log.open("a") as stream:
        stream.write(f"\n=== {step.name} ===\n")
        stream.flush()
        # In a session of its own, so that processes that the step starts end with it.
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    record = of_step(record.file, step.name, context.rehearsal)
    if record.status == RUNNING:  # it could not record how it ended
        reason = last_error(log) or f"ended with code {code}"
        if code is None:
            reason = f"not ready after {seconds:.0f} s"
        record.end(FAILED, reason, time.monotonic() - started)
    return record


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
