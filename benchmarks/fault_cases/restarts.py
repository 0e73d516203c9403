"""Ranks, launchers and machines that are lost, and runs that start again. Launchers stand for machines."""

import time
from pathlib import Path

import psutil

from fault_cases.harness import (
    WAIT,
    Program,
    case,
    expect,
    free_port,
    launcher,
    losses,
    metrics,
    start,
    train_command,
    undisturbed,
)
from megatron_ext.training import starts

INJECT = "callbacks=[fault_cases.injections:{}]"


@case(
    1,
    "SIGKILL to a rank between two iterations",
    expected="all ranks start again; losses are bit for bit those of an undisturbed run",
)
def killed_rank(folder: Path) -> str:
    run = start(folder / "run", INJECT.format("Kill"), restarts=1, FAULT_RANK="1", FAULT_ITERATION="4")
    expect(run.wait() == 0, run.tail())
    expect(losses(run.output) == undisturbed(), "the losses differ from those of an undisturbed run")
    first, error, second = starts.read(run.output)[:3]
    expect("world" in second and second["iteration"] == 2, f"not resumed from iteration 2: {second}")
    seconds = error["time"] - first["time"]
    return f"its peer ended within {seconds:.0f} s of the start; resumed from iteration 2, same losses bit for bit"


@case(
    7,
    "SIGKILL to a process that packs rows",
    expected="its rank says so within 60 s; all ranks start again; losses of an undisturbed run",
)
def killed_worker(folder: Path) -> str:
    settings = ("data.workers=1", "training.iterations=12")
    run = start(folder / "run", *settings, INJECT.format("LongSteps"), restarts=1)
    run.wait_for_iteration(3)
    workers = [p for p in run.ranks()[1].children() if "spawn_main" in " ".join(p.cmdline())]
    expect(workers, "rank 1 has no process that packs rows")
    workers[0].kill()
    killed = time.time()
    expect(run.wait() == 0, run.tail())
    error = next((record for record in starts.read(run.output) if record.get("rank") == 1), None)
    expect(error, "rank 1 has recorded no error")
    # Whoever notices first: the loader (torch), or the watch of the workers.
    named = ("DataLoader worker", "a process that packs data ended with exit code -9")
    expect(any(name in error["error"] for name in named), error["error"])
    seconds = max(0, error["time"] - killed)
    expect(seconds < 60, f"after {seconds:.0f} s")
    expect(losses(run.output) == undisturbed("training.iterations=12"), "other losses")
    said = error["error"].replace(str(workers[0].pid), "N")
    return f"after {seconds:.0f} s: `{said}`; started again, same losses bit for bit"


@case(
    12,
    "a machine is lost (launcher and ranks of one of 3 killed), and comes back",
    expected="replicas 3 -> 2 -> 3, each from a checkpoint; every iteration once; losses to 1e-6 of an undisturbed run",
)
def lost_machine(folder: Path) -> str:
    sizes = ("training.iterations=40", "training.global_batch_size=6", "training.micro_batch_size=1")
    settings = (*sizes, INJECT.format("LongSteps"))
    launchers = _launchers(folder, 3, "2:3", *settings)
    launchers[0].wait_for_iteration(4)
    launchers[2].kill()
    lost_at = time.monotonic()
    launchers[0].wait_until(lambda: _worlds(folder / "run")[-1] == 2, WAIT)
    seconds = time.monotonic() - lost_at
    at = len(metrics(folder / "run"))
    launchers[0].wait_until(lambda: len(metrics(folder / "run")) > at, WAIT)
    launchers[2] = _launchers(folder, 3, "2:3", *settings, only=2, port=launchers[0].port)[0]
    codes = [program.wait(2 * WAIT) for program in launchers]
    expect(codes == [0, 0, 0], f"exit codes {codes}: {launchers[0].tail()}")
    worlds = _worlds(folder / "run")
    expect(worlds == [3, 2, 3], f"worlds {worlds}")
    expected = undisturbed(*sizes)
    worst = max(abs(a / b - 1) for a, b in zip(losses(folder / "run"), expected, strict=True))
    expect(worst < 1e-6, f"losses differ by {worst:.1e}")
    return f"worlds 3, 2, 3; going on with 2 after {seconds:.0f} s; losses to {worst:.0e}"


@case(
    16,
    "one rank alone raises a UserError",
    expected="all ranks end within 30 s, that line is last, exit code 1",
)
def one_rank_refuses(folder: Path) -> str:
    run = start(folder / "run", INJECT.format("Refuse"), FAULT_RANK="1", FAULT_ITERATION="3")
    run.wait_until(lambda: (folder / "run" / ".fault-0").exists())
    raised = time.monotonic()
    code = run.wait()
    seconds = time.monotonic() - raised
    expect(code == 1, f"exit code {code}")
    expect(seconds < 30, f"ended after {seconds:.0f} s")
    last = run.text().strip().splitlines()[-1]
    expect("rank 1" in last and "injected: something only this rank can see is wrong" in last, last)
    return f"ended after {seconds:.0f} s with code 1; last line: `{last}`"


@case(
    17,
    "the machine is lost that the others meet at (its launcher and ranks are killed)",
    expected="the other launchers end within 60 s, not with 0; the next start resumes",
)
def lost_rendezvous(folder: Path) -> str:
    settings = ("training.iterations=30", INJECT.format("LongSteps"))
    launchers = _launchers(folder, 2, "2", *settings)
    launchers[1].wait_for_iteration(3)
    launchers[0].kill()
    lost_at = time.monotonic()
    code = launchers[1].wait()
    seconds = time.monotonic() - lost_at
    expect(code != 0, "exit code 0")
    expect(seconds < 60, f"ended after {seconds:.0f} s")
    again = start(folder / "run", *settings)
    expect(again.wait() == 0, again.tail())
    expect(losses(folder / "run") == undisturbed("training.iterations=30"), "other losses")
    return f"ended with code {code} after {seconds:.0f} s; started again by hand: same losses bit for bit"


@case(
    18,
    "a crash at the same iteration in every start",
    expected="given up after three, naming the iteration and the first error; exit code 2",
)
def same_crash(folder: Path) -> str:
    run = start(
        folder / "run",
        INJECT.format("Crash"),
        restarts=8,
        FAULT_RANK="1",
        FAULT_ITERATION="4",
        FAULT_TIMES="100",
    )
    code = run.wait(2 * WAIT)
    expect(code == 2, f"exit code {code}")
    line = run.line("given up: 3 starts at iteration 2 have failed", "rank 1: RuntimeError: injected in iteration 4")
    expect((folder / "run" / "REFUSED").exists(), "no REFUSED")
    iterations = [record["iteration"] for record in starts.read(run.output) if "world" in record]
    expect(iterations == [0, 2, 2, 2], f"starts at iterations {iterations}")
    return f"exit code 2: `{line}`"


class _Machine(Program):
    """A launcher that stands for a machine; ``port`` is the one at which all meet."""

    port: int


def _launchers(
    folder: Path, count: int, nodes: str, *overrides: str, only: int | None = None, port: int | None = None
) -> list[_Machine]:
    """Launchers of one rank each, which meet at the first; ``only`` starts one of them."""
    port = port or free_port()
    started = []
    for number in range(count) if only is None else [only]:
        options = ["--nnodes", nodes, "--rdzv-backend", "c10d", "--rdzv-id", "run", "--max-restarts", "3"]
        options += ["--rdzv-endpoint", f"localhost:{port}", "--rdzv-conf", "last_call_timeout=5"]
        options += ["--local-addr", "localhost"]
        command = [*launcher(1, *options), *train_command(folder / "run", *overrides)]
        started.append(_Machine(command, folder / "run", folder / f"machine-{number}.log"))
        started[-1].port = port
        if number == 0:  # whoever comes first is the host
            started[0].wait_until(lambda: _listens(started[0].process.pid, port))
    return started


def _listens(pid: int, port: int) -> bool:
    connections = psutil.Process(pid).net_connections(kind="tcp")
    return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in connections)


def _worlds(output: Path) -> list[int]:
    return [record["world"] for record in starts.read(output) if "world" in record] or [0]
