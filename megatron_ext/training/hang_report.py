"""What a rank is doing, who holds up a run whose ranks do not get on, and the report about it.

Everything about a rank is a plain dictionary, its *beat*:

=========================  =========================================================================================
rank, host, pid            who
previous                   the rank of the pipeline stage before it, with several stages
step, phase, number        where its training thread is (``watch.py``)
unmoved, allowed           seconds since it got there, and that it may take
count                      of its beats; the same for a while: it is silent
state, where               "waits" for other ranks or the device, "busy" or "debugged"; in which function and line
stack                      of the training thread, outermost first
collectives                by process group: the last collective that it entered, from torch's flight recorder
gpu                        whether it has one: its thread runs ahead of what the device does
reading                    files that it and its processes are reading, in phases that read data
silent, ended              as the judging rank finds it; with which error, if any, it left
=========================  =========================================================================================
"""

import json
import linecache
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import torch

from megatron_ext.data import reading
from megatron_ext.distributed import recorded_collectives

_MOST_NAMED = 4
_PASSES = ("forward", "backward")
_ORDER = ("start", "data", "before_step", "passes", "reduce", "prefetch", "optimizer", "callbacks", "evaluate", "save")
_ORDER += ("end",)
_WAITS_FOR_DEVICE = (".tolist()", ".item()", "synchronize(", "float(", ".cpu()")


def activity(frame: FrameType, others: Sequence[FrameType] = (), phase: str = "") -> dict:
    """What a thread is doing; ``others``: frames of the other threads, one of which may run its backward pass."""
    frames = _frames(frame)
    if frames[-1].f_code.co_name == "_engine_run_backward":  # with a GPU, another thread runs the backward pass
        running = (_frames(other) for other in others)
        frames = next((f for f in running if any("torch/autograd/function" in _file(x) for x in f)), frames)
    inner, own = frames[-1], next((f for f in reversed(frames) if "/megatron_ext/" in _file(f)), None)
    waits = _waits(inner)
    where = _call(frames) if waits else _location(inner)
    if own is not None and own is not inner:
        where += f", called from {_location(own)}"
    gpu, collectives = torch.cuda.is_initialized(), recorded_collectives()
    # Behind a collective that does not end, launches block in the end: any line then waits.
    waits = waits or (gpu and any(of["entered"] > of["completed"] for of in collectives.values()))
    state = "debugged" if any(map(_is_debugged, frames)) else "waits" if waits else "busy"
    result = {"state": state, "where": where, "stack": [_location(f) for f in frames], "gpu": gpu}
    result["collectives"] = collectives
    if phase in ("start", "data", "prefetch", "evaluate"):
        result["reading"] = _being_read()
    return result


def all_stuck(ranks: list[dict], tolerance: float) -> bool:
    """Whether no rank gets on: each has been where it is for as long as it may, is silent, or has left. Never while one
    is in a debugger.

    Args:
        tolerance: seconds by which the readings may be old.
    """
    if any(rank.get("state") == "debugged" and not rank["silent"] for rank in ranks):
        return False
    return all(rank["silent"] or "ended" in rank or rank["unmoved"] > rank["allowed"] - tolerance for rank in ranks)


def report(ranks: list[dict], folder: Path) -> dict:
    """Who holds up the run, and all that is known."""
    step = max(rank["step"] for rank in ranks)
    held_up = causes(ranks)
    named = [f"rank {n} ({_who(ranks, n)}) {text}" for n, text in held_up[:_MOST_NAMED]]
    if len(held_up) > _MOST_NAMED:
        named.append(f"and {len(held_up) - _MOST_NAMED} more ranks")
    line = f"step {step} hangs: {'; '.join(named) or 'all ranks wait for one another'}"
    if waiting := _waiting(ranks, {n for n, _ in held_up}):
        line += f"; waiting: {waiting}"
    line += f"; stacks are in {folder}"
    return {
        "step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "line": line,
        "causes": [{"rank": n, "cause": text} for n, text in held_up],
        "ranks": ranks,
    }


def causes(ranks: list[dict]) -> list[tuple[int, str]]:
    """The ranks that hold up the others, each with how."""
    gone, busy = [], []
    for rank in ranks:
        if rank.get("ended", "complete") != "complete":
            gone.append((rank["rank"], f"left with {rank['ended']}"))
        elif rank.get("holds_store"):
            text = (
                "or the launcher's agent beside it, does not answer for the store: stopped, killed, or its host is lost"
            )
            gone.append((rank["rank"], text))
        elif rank.get("silent"):
            text = f"is silent, last heard of in {_place(rank)}: stopped, killed, or holding the GIL"
            gone.append((rank["rank"], text))
        elif rank.get("state") == "busy" and "ended" not in rank:
            reads = f"reading {', '.join(rank['reading'])}; " if rank.get("reading") else ""
            busy.append((rank["rank"], f"is busy in {_place(rank)}: {reads}{rank['where']}"))
    if not gone and any(rank.get("gpu") for rank in ranks):  # a rank that waits for messages between stages looks busy
        return _left_out(ranks) or _not_sent(ranks) or busy or _behind(ranks)
    return sorted(gone + busy) or _left_out(ranks) or _not_sent(ranks) or _behind(ranks)


def write(report: dict, folder: Path, token: str) -> bool:
    """Write the report unless another rank of this start has done so; ``token``: names the start.

    Returns:
        Whether this rank wrote it.
    """
    mark = f'"start": "{token}"'  # compared rather than times: clocks of file servers differ
    for attempt in range(1, 1000):
        file = folder / f"step_{report['step']}{f'_{attempt}' if attempt > 1 else ''}.json"
        try:
            with file.open("x") as stream:
                stream.write(json.dumps({"start": token, **report}, indent=1) + "\n")
            return True
        except FileExistsError:
            if not file.stat().st_size:
                time.sleep(1)  # it may be being written
            if mark in file.read_text():
                return False
    return False


def _left_out(ranks: list[dict]) -> list[tuple[int, str]]:
    """Ranks that others wait for in a collective that they have passed without taking part in it."""
    left_out = {}
    for name in sorted({name for rank in ranks for name in rank.get("collectives", {})}):
        members = [rank for rank in ranks if name in rank.get("collectives", {})]
        newest = max(rank["collectives"][name]["entered"] for rank in members)
        waiting = [rank for rank in members if rank["collectives"][name]["entered"] == newest]
        kind = waiting[0]["collectives"][name]["operation"]
        for rank in members:
            entered = rank["collectives"][name]["entered"]
            if entered < newest and _progress(rank) >= min(map(_progress, waiting)):
                who = _ranges([waiter["rank"] for waiter in waiting])
                left_out.setdefault(
                    rank["rank"],
                    f"left out collective {newest} of process group {name}, in which {who} {_wait(waiting)} ({kind}): "
                    f"its own last one there is {entered}, and it is in {_place(rank)}, {rank.get('where')}",
                )
    return list(left_out.items())


def _not_sent(ranks: list[dict]) -> list[tuple[int, str]]:
    """Ranks that have not sent what the next stage waits for, and wait for what it can only send afterwards."""
    by_rank = {rank["rank"]: rank for rank in ranks}
    unsent = []
    for rank in ranks:
        before = by_rank.get(rank.get("previous"), {})
        if "recv_forward" in rank.get("where", "") and "recv_backward" in before.get("where", ""):
            text = f"has sent rank {rank['rank']} too few activations: that waits in {_place(rank)}, {rank['where']}"
            unsent.append((before["rank"], f"{text}, and it itself in {_place(before)}, {before['where']}"))
    return unsent


def _behind(ranks: list[dict]) -> list[tuple[int, str]]:
    """Ranks that are behind the others by step and phase."""
    there = [rank for rank in ranks if "ended" not in rank]
    least = min(map(_progress, there))
    behind = [rank for rank in there if _progress(rank) == least]
    if len(behind) == len(there):
        return []
    return [(rank["rank"], f"is behind the others, in {_place(rank)}: {rank.get('where')}") for rank in behind]


def _progress(rank: dict) -> tuple[int, int]:
    return rank["step"], _ORDER.index("passes" if rank["phase"] in _PASSES else rank["phase"])


def _place(rank: dict) -> str:
    number = f" {rank['number']}" if rank["number"] else ""
    return f"step {rank['step']}, {rank['phase']}{number}"


def _who(ranks: list[dict], number: int) -> str:
    rank = ranks[[r["rank"] for r in ranks].index(number)]
    return f"{rank.get('host', 'unknown host')}, pid {rank.get('pid', 'unknown')}"


def _waiting(ranks: list[dict], causing: set[int]) -> str:
    places: dict[str, list[int]] = {}
    for rank in ranks:
        if rank["rank"] not in causing:
            places.setdefault(_place(rank), []).append(rank["rank"])
    shown = [f"{_ranges(numbers)} in {place}" for place, numbers in list(places.items())[:_MOST_NAMED]]
    return ", ".join(shown) + (" ..." if len(places) > _MOST_NAMED else "")


def _wait(waiting: list) -> str:
    return "waits" if len(waiting) == 1 else "wait"


def _ranges(numbers: Sequence[int]) -> str:
    """Such as ``rank 3`` and ``ranks 0-3, 7``."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    parts = [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends)]
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(parts)}"


def _frames(frame: FrameType | None) -> list[FrameType]:
    """The frames of a thread, outermost first."""
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames[::-1]


def _file(frame: FrameType) -> str:
    return frame.f_code.co_filename


def _location(frame: FrameType) -> str:
    file = _file(frame).rpartition("site-packages/")[2]
    _, package, rest = file.rpartition("/megatron_ext/")
    return f"{(package + rest).lstrip('/') if package else file}:{frame.f_lineno} in {frame.f_code.co_name}"


def _is_debugged(frame: FrameType) -> bool:
    """Whether a debugger steps through a frame, or is one of its own (after an error it traces nothing)."""
    return frame.f_trace is not None or os.path.basename(_file(frame)) in ("bdb.py", "pdb.py")


def _waits(frame: FrameType) -> bool:
    """Whether a frame waits for other ranks or for the device."""
    file, line = _file(frame), linecache.getline(_file(frame), frame.f_lineno)
    if torch.cuda.is_initialized() and any(call in line for call in _WAITS_FOR_DEVICE):
        return True
    communicates = "torch/distributed/" in file or "megatron/core/" in file or "/megatron_ext/" in file
    return "torch/distributed/" in file or "p2p_communication" in file or (communicates and ".wait(" in line)


def _call(frames: list[FrameType]) -> str:
    """The function of torch.distributed, or of messages between stages, in which a thread waits."""
    name = frames[-1].f_code.co_name
    for frame in reversed(frames):
        if "torch/distributed/" not in _file(frame) and "p2p_communication" not in _file(frame):
            break
        if frame.f_code.co_name != "wrapper":  # torch's, around every collective
            name = frame.f_code.co_name
    return name


def _being_read() -> list[str]:
    """Files that this process and its workers are reading."""
    processes = [str(os.getpid())]
    for children in Path("/proc/self/task").glob("*/children"):
        try:
            processes += children.read_text().split()
        except OSError:
            continue
    return sorted({file for pid in processes if (file := reading.of(int(pid)))})
