"""Runs that hang, slow ranks, and numbers that are wrong on one rank."""

import json
import os
import shutil
import signal
from pathlib import Path

import yaml

from fault_cases.harness import Program, case, expect, losses, material, metrics, start, undisturbed

MINUTES = 0.1
LIMIT = f"lifecycle.hang_minutes={MINUTES}"
EXPECTED = f"within {60 * MINUTES:.0f} s + 10 s the rank is named, stacks are written, exit code 75, torchrun restarts"


def injected(name: str, rank: int = 1, iteration: int = 3) -> tuple[str, dict[str, str]]:
    """The setting and the environment that inject a fault of :mod:`fault_cases.injections`."""
    return f"callbacks=[fault_cases.injections:{name}]", {"FAULT_RANK": str(rank), "FAULT_ITERATION": str(iteration)}


def hang_report(run: Program, cause: str, *parts: str, rank: int = 1, allowed: float = 60 * MINUTES) -> str:
    """Wait for a hang to be reported, and check the report: its first cause is ``rank``. Returns what was said."""
    folder = run.output / "hang"
    run.wait_until(lambda: list(folder.glob("step_*.json")))
    [file] = folder.glob("step_*.json")
    run.wait_until(lambda: file.stat().st_size > 0 and file.read_text().endswith("\n"))
    report = json.loads(file.read_text())
    expect(report["causes"], f"no cause: {report['line']}")
    first = report["causes"][0]
    expect(first["rank"] == rank and cause in first["cause"], report["line"])
    for part in parts:
        expect(part in report["line"], f"no {part!r}: {report['line']}")
    seconds = max(r["unmoved"] for r in report["ranks"] if "unmoved" in r and not r.get("silent"))
    expect(seconds < allowed + 10, f"named after {seconds:.1f} s")
    return f'named after {seconds:.1f} s: "rank {rank} {first["cause"]}"'


def restarted(run: Program, *overrides: str) -> str:
    """Wait for the end of a run that was started again, and compare its losses with an undisturbed one's."""
    expect(run.wait() == 0, run.tail())
    expect(" exitcode  : 75" in run.text() or "exitcode: 75" in run.text(), "no rank ended with code 75")
    expect(losses(run.output) == undisturbed(*overrides), "the losses differ from those of an undisturbed run")
    return "exit code 75, restarted, same losses bit for bit"


def stack(run: Program, rank: int, *parts: str) -> None:
    """Check that a rank's stacks have been written and name functions."""
    text = (run.output / "hang" / f"rank_{rank}.txt").read_text()
    for part in parts:
        expect(part in text, f"the stack of rank {rank} lacks {part}: {text[-300:]}")


@case(3, "SIGSTOP to a rank in training", expected=EXPECTED)
def stopped_rank(folder: Path) -> str:
    callback, environment = injected("Wait")
    run = start(folder / "run", LIMIT, callback, restarts=1, **environment)
    mark = run.output / ".fault-0"
    run.wait_until(mark.exists)
    os.kill(run.ranks()[1].pid, signal.SIGSTOP)
    said = hang_report(run, "is silent")
    outcome = restarted(run)
    stack(run, 0, "all_reduce")
    return f"{said}; {outcome}"


@case(4, "a rank computes for ever and holds the interpreter lock", expected=EXPECTED)
def held_interpreter(folder: Path) -> str:
    callback, environment = injected("HoldInterpreter")
    run = start(folder / "run", LIMIT, callback, restarts=1, **environment)
    said = hang_report(run, "is silent")
    outcome = restarted(run)
    stack(run, 1, "injections.py", "strike")
    return f"{said}; its stack shows the function; {outcome}"


@case(5, "a rank leaves out an all-reduce; a stage does not send", expected="named by the collective; by the phase")
def left_out(folder: Path) -> str:
    callback, environment = injected("LeaveOutReduction")
    run = start(folder / "reduction", LIMIT, callback, restarts=1, **environment)
    said = hang_report(run, "left out collective", "all_reduce")
    outcome = restarted(run)
    callback, environment = injected("LoseMessage", rank=0)
    stages = ("parallel.pipeline=2",)
    run = start(folder / "stages", LIMIT, *stages, callback, restarts=1, **environment)
    waiting = hang_report(run, "has sent rank 1 too few activations", "recv_forward", "recv_backward", rank=0)
    return f"{said}; {outcome}. Stage: {waiting}; {restarted(run, *stages)}"


@case(6, "the reader of a replica waits for a file that gives nothing", expected="rank, phase data and file are named")
def blocked_reader(folder: Path) -> str:
    config = yaml.safe_load(material().read_text())
    source = Path(config["data"]["train"][0]["path"])
    for kind in ("bin", "idx", "json"):
        shutil.copy(f"{source}.{kind}", folder / f"{source.name}.{kind}")
    train = f"data.train=[{{path: {folder / source.name}, task: understanding}}]"
    callback, environment = injected("BlockedFile")
    settings = ("lifecycle.hang_minutes=0.3", "parallel.tensor=2", "data.workers=1", train, callback)
    run = start(folder / "run", *settings, **environment)
    # The first step may take six times the limit; a worker takes a while to start.
    said = hang_report(run, f"reading {folder / source.name}.bin", "data", rank=0, allowed=6 * 60 * 0.3)
    expect(run.wait() != 0, "the run ended well")
    return f"{said} (the first step may take six times the limit)"


@case(8, "the gradient of one rank is not a number", expected="the step is skipped; rank and parameter are named")
def not_a_number(folder: Path) -> str:
    outcomes = []
    for again in (True, False):
        callback, environment = injected("NotANumber")
        run = start(folder / f"again-{again}", callback, **environment, **({"FAULT_AGAIN": "1"} if again else {}))
        expect(run.wait() == 0, run.tail())
        records = metrics(run.output)
        found = [m.get("non_finite") for m in records]
        expect([i for i, text in enumerate(found) if text] == [2], f"reported in {found}")
        expect(records[2]["skipped_steps"] == 1 == records[-1]["skipped_steps"], "not skipped once")
        expect("decoder.layers.1.mlp.linear_fc2.weight" in found[2], found[2])
        expect(("rank 1" in found[2]) == again, found[2])
        outcomes.append(f'"{found[2]}"')
    return f"again: {outcomes[0]}; once: {outcomes[1]}"


@case(
    9,
    "a bit flips in the weights of one of three replicas",
    expected="rank and parameter are named within the interval; exit 1",
)
def flipped_bit(folder: Path) -> str:
    callback, environment = injected("FlipBit")
    check = "lifecycle.replica_check_interval=1"
    run = start(folder / "run", check, callback, processes=3, restarts=1, **environment)
    expect(run.wait() == 0, run.tail())
    line = run.line("the replicas' weights differ (decoder.layers.1.mlp.linear_fc1.weight on rank 1)")
    expect("iter_0000002 is from before" in line, line)
    expect(losses(run.output) == undisturbed(processes=3), "the losses differ from those of an undisturbed run")
    return f'"{line.partition(": ")[2]}"; restarted, same losses bit for bit'


@case(14, "a rank takes 30 % more time for each pass", expected="named after three comparisons; the run goes on")
def slow_rank(folder: Path) -> str:
    callback, environment = injected("Slow")
    settings = ("logging.straggler_interval=5", "training.iterations=30", "checkpoint.interval=0", "model.num_layers=8")
    run = start(folder / "run", *settings, callback, **environment)
    expect(run.wait() == 0, run.tail())
    line = run.line("rank 1", "of the speed of its peers")
    named = [m["iteration"] for m in metrics(run.output) if "stragglers" in m]
    expect(named, "not in metrics.jsonl")
    return f'"{line}", in metrics.jsonl from iteration {named[0]}; the run completed'
