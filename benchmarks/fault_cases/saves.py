"""Checkpoints that are interrupted, refused or damaged, and two runs in one folder."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from fault_cases.harness import (
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
from megatron_ext.checkpoints.folder import MARKER, checkpoints, iteration_of

FULL = "No space left on device"


@case(
    2,
    "SIGKILL to a rank at several file operations of a save; SIGTERM to a rank in a save",
    expected="the checkpoint is complete or absent; the run goes on, or stops with code 0 and resumes; same losses",
)
def killed_in_save(folder: Path) -> str:
    resumed = []
    for number in (2, 9, 13):
        run = start(
            folder / f"change_{number}",
            "callbacks=[fault_cases.save_injections:KillInSave]",
            restarts=1,
            FAULT_ITERATION="4",
            FAULT_CHANGE=str(number),
        )
        expect(run.wait() == 0, run.tail())
        expect(losses(run.output) == undisturbed(), f"killed before change {number}: other losses")
        resumed.append(re.search(r"iter_0*(\d+)", run.line("resumed from"))[1])
    output = folder / "terminated"
    injected = "callbacks=[fault_cases.save_injections:TerminateInSave]"
    first = start(output, injected, FAULT_ITERATION="4", FAULT_RANK="1")
    expect(first.wait() == 0 and not (output / "FINISHED").exists(), first.tail())
    again = start(output)
    expect(again.wait() == 0 and losses(output) == undisturbed(), again.tail())
    return (
        f"killed before the 2nd, 9th and 13th change: resumed from iterations {', '.join(resumed)}; SIGTERM: "
        "exit 0 and resumed; same losses bit for bit"
    )


@case(
    10,
    "full disk and read-only folder during saves, synchronous and asynchronous",
    expected="one line with the path; nothing published; training goes on; an error after 3 in a row",
)
def full_disk(folder: Path) -> str:
    settings = ("training.iterations=14", "checkpoint.interval=2")
    for kind in ("false", "true"):
        with _disk(folder / f"disk_{kind}") as disk:
            background = f"checkpoint.asynchronous={kind}"
            run = _start(disk / "run", folder / f"{kind}.log", *settings, background, pauses="6,9")
            _wait_for_checkpoint(run, 4)
            with _filled(disk):
                _go_on(run, 6)
                run.wait_until(lambda run=run: "\n 8/14" in run.text())
            _go_on(run, 9)
            expect(run.wait() == 0, run.tail())
            said = run.line("not written", str(run.output / "checkpoints" / "iter_0000006"), FULL)
            _expect_undisturbed(run, *settings)
            kept = [iteration_of(path) for path in checkpoints(run.output / "checkpoints")]
            expect(6 not in kept and kept[-1] == 14, f"checkpoints of iterations {kept}")
            expect(not list(run.output.glob("checkpoints/.iter*")), "something is left of a checkpoint")
    with _disk(folder / "disk_small", "300k") as disk:
        run = _start(disk / "run", folder / "small.log", *settings)
        expect(run.wait() == 1 and run.text().count("not written") == 2, run.tail())
        run.line(FULL, "the last attempt")
    run = _start(folder / "read_only", folder / "read_only.log", *settings, pauses="3,7")
    _wait_for_checkpoint(run, 2)
    with _read_only(run.output / "checkpoints"):
        _go_on(run, 3)
        run.wait_for_iteration(6)
        run.wait_until(lambda: run.text().count("not written") == 2)
    _go_on(run, 7)
    run.line("not written", str(run.output / "checkpoints"), "Read-only file system")
    expect(run.wait() == 0, run.tail())
    _expect_undisturbed(run, *settings)
    return f"training went on and saved again once there was room, same losses; exit 1 after 3; said: {_short(said)}"


@case(
    11,
    "the newest checkpoint is truncated, has one bit changed, or lost its marker",
    expected="refused by name, or with checkpoint.on_damage=older resumed from the one before, which is said",
)
def damaged_checkpoint(folder: Path) -> str:
    output = folder / "run"
    run = start(output)
    expect(run.wait() == 0, run.tail())
    whole = folder / "whole"
    shutil.copytree(output, whole)
    newest = checkpoints(output / "checkpoints")[-1]
    data = newest / "__1_0.distcp"

    def flip() -> None:
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)

    harms = {
        "truncated": lambda: os.truncate(data, data.stat().st_size // 2),
        "one bit": flip,
        "no marker": (newest / MARKER).unlink,
    }
    for name, harm in harms.items():
        shutil.rmtree(output)
        shutil.copytree(whole, output)
        harm()
        if name == "one bit":
            refused = start(output)
            expect(refused.wait() == 1, refused.tail())
            refused.line(str(data), "damaged")
        run = start(output, "checkpoint.on_damage=older")
        expect(run.wait() == 0, f"{name}: {run.tail()}")
        run.line(f"{newest.name} is renamed {newest.name}.damaged")
        _expect_undisturbed(run)
        expect((output / "checkpoints" / f"{newest.name}.damaged").is_dir(), f"{name}: the damaged one is gone")
    return "refused with the file's name; with older: renamed, resumed from iteration 4, same losses bit for bit"


@case(
    15,
    "all processes of two nodes are killed; the local disk of one node is lost, then of both",
    expected="resumes from the copy on the other node; from the shared checkpoint",
)
def lost_disks(folder: Path) -> str:
    settings = ("training.iterations=8", "checkpoint.interval=4", "checkpoint.local_interval=1")
    output, disks = folder / "run", [folder / "node0", folder / "node1"]

    def nodes(name: str) -> list[Program]:
        port = str(free_port())
        return [
            Program(
                [sys.executable, *train_command(output, *settings, "checkpoint.local=$NODE_DISK", PAUSE)],
                output,
                folder / f"{name}_{rank}.log",
                FAULT_PAUSES="8",
                FAULT_GO=str(folder / "go"),
                RANK=str(rank),
                WORLD_SIZE="2",
                LOCAL_RANK="0",
                LOCAL_WORLD_SIZE="1",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
                NODE_DISK=str(disk),
            )
            for rank, disk in enumerate(disks)
        ]

    def resumed(name: str) -> str:
        programs = nodes(name)
        for program in programs:
            expect(program.wait() == 0, program.tail())
        _expect_undisturbed(programs[1], *settings[:2])
        return programs[1].line("resumed from").removeprefix("resumed from ")

    first = nodes("first")
    first[1].wait_for_iteration(7)
    for program in first:
        program.kill()
    (folder / "go-8").touch()
    kept = folder / "kept"
    for path in (output, *disks):
        shutil.copytree(path, kept / path.name)
    shutil.rmtree(disks[1])
    of_partner = resumed("one_disk_lost")
    expect("local checkpoint" in of_partner and "copies" in of_partner, of_partner)
    shutil.rmtree(output)
    shutil.copytree(kept / "run", output)
    for disk in disks:
        shutil.rmtree(disk)
    of_both = resumed("both_disks_lost")
    expect(of_both.endswith("iter_0000004"), of_both)
    return f"one disk lost: resumed from {of_partner}; both: from iter_0000004; same losses bit for bit"


@case(
    19,
    "a second run is started into the output folder of a running one; then the first is killed and started again",
    expected="the second is told who holds the folder and changes nothing; the restart need not wait",
)
def two_runs(folder: Path) -> str:
    output = folder / "run"
    run = _start(output, folder / "first.log", pauses="6")
    run.wait_for_iteration(5)
    before = [record["iteration"] for record in metrics(output)]
    second = _start(output, folder / "second.log")
    expect(second.wait() != 0, "both runs train")
    said = second.line("another run trains here", f"process {run.ranks()[0].pid} on ")
    expect([record["iteration"] for record in metrics(output)] == before, "the second run has changed metrics.jsonl")
    run.kill()
    again = _start(output, folder / "again.log")
    expect(again.wait() == 0, again.tail())
    again.line("taken over from process", "which has ended")
    again.line("resumed from", "iter_0000004")
    _expect_undisturbed(again)
    expect(not (output / "LOCK").exists(), "the lock is left")
    return f"refused: {_short(said)}; the killed run resumed at once, same losses bit for bit"


@case(
    20,
    "the disk is full for metrics.jsonl and all else, for a while",
    expected="one line with the path; training goes on; nothing is missing in metrics.jsonl once there is room",
)
def full_for_metrics(folder: Path) -> str:
    settings = ("training.iterations=20", "checkpoint.interval=0", "logging.tensorboard=true")
    with _disk(folder / "disk") as disk:
        run = _start(disk / "run", folder / "run.log", *settings, pauses="3,16")
        run.wait_for_iteration(2)
        with _filled(disk):
            _go_on(run, 3)
            run.wait_until(lambda: "\n15/20" in run.text())
        _go_on(run, 16)
        expect(run.wait() == 0, run.tail())
        said = run.line("metrics.jsonl", FULL, "are not written")
        _expect_undisturbed(run, *settings[:2])
    return f"training went on, all records are there, same losses; said: {_short(said)}"


PAUSE = "callbacks=[fault_cases.save_injections:Pause]"


def _start(output: Path, log: Path, *overrides: str, pauses: str = "") -> Program:
    """As ``start``, with the log elsewhere than on the output's small disk, and pauses before these iterations."""
    command = [*launcher(2, "--standalone", "--max-restarts", 0), *train_command(output, *overrides)]
    if not pauses:
        return Program(command, output, log)
    return Program([*command, PAUSE], output, log, FAULT_PAUSES=pauses, FAULT_GO=str(log.with_suffix(".go")))


def _wait_for_checkpoint(run: Program, iteration: int) -> None:
    run.wait_until(lambda: iteration in [iteration_of(path) for path in checkpoints(run.output / "checkpoints")])


def _go_on(run: Program, iteration: int) -> None:
    """End the pause before this iteration."""
    Path(f"{run.log.with_suffix('.go')}-{iteration}").touch()


@contextlib.contextmanager
def _filled(disk: Path) -> Iterator[None]:
    """No byte is left on the disk."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as stream:
        while True:
            stream.write(bytes(4096))
    try:
        yield
    finally:
        filler.unlink()


def _expect_undisturbed(run: Program, *settings: str) -> None:
    expect(losses(run.output) == undisturbed(*settings), "the losses differ from those of an undisturbed run")


@contextlib.contextmanager
def _disk(folder: Path, size: str = "16m") -> Iterator[Path]:
    """A small disk of its own; needs root."""
    folder.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


@contextlib.contextmanager
def _read_only(folder: Path) -> Iterator[None]:
    _mount("--bind", folder, folder)
    try:
        _mount("-o", "remount,ro,bind", folder)
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def _mount(*arguments) -> None:
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    expect(done.returncode == 0, f"this case needs to mount a disk: {done.stderr.strip()}")


def _short(line: str) -> str:
    """A line without the temporary folder in front of its paths."""
    return re.sub(r"/\S*/(?=(run|checkpoints|disk\w*)\b)", ".../", line)
