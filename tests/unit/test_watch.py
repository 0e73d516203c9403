"""A run that hangs is ended and the rank at fault is named; one that gets on, or takes long where it may, is not."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from megatron_ext.data import reading
from megatron_ext.training import hang_report, watch
from megatron_ext.training.beats import Beats
from megatron_ext.training.schedule_timers import ScheduleTimers
from support.programs import PYTHON_PATH, wait_until


def beat(rank: int, state: str = "waits", step: int = 7, phase: str = "reduce", **more) -> dict:
    """A rank that has been where it is for longer than it may."""
    known = {"rank": rank, "host": "a", "pid": 1, "step": step, "phase": phase, "number": 0, "silent": False}
    return known | {"unmoved": 301.0, "allowed": 300.0, "state": state, "where": "f"} | more


def collectives(entered: int) -> dict:
    return {"3 data": {"entered": entered, "completed": entered - 1, "operation": "gloo:all_reduce"}}


@pytest.mark.parametrize(
    "fault, said",
    [
        (beat(1, silent=True), "is silent"),
        (beat(1, ended="ValueError: x"), "left with ValueError: x"),
        (beat(1, "busy", phase="data", reading=["d/x.bin"]), "is busy in step 7, data: reading d/x.bin"),
        (beat(1, phase="optimizer", collectives=collectives(4)), "left out collective 5 of process group 3 data"),
        (beat(1, phase="forward", number=2), "is behind the others, in step 7, forward 2"),
    ],
)
def test_the_rank_that_holds_up_the_others_is_named(fault, said):
    ranks = [beat(0, collectives=collectives(5)), fault, beat(2, collectives=collectives(5))]
    [(rank, cause)] = hang_report.causes(ranks)
    assert rank == 1 and said in cause


def test_the_stage_that_did_not_send_is_named():
    ranks = [
        beat(0, phase="forward", where="recv_backward"),
        beat(1, phase="forward", where="recv_forward", previous=0),
    ]
    [(rank, cause)] = hang_report.causes(ranks)
    assert rank == 0 and "has sent rank 1 too few activations" in cause


def test_nobody_is_blamed_where_all_ranks_wait_at_the_same_place():
    assert hang_report.causes([beat(0), beat(1)]) == []


def test_ranks_that_wait_for_one_that_saves_or_moves_do_not_hang():
    assert hang_report.all_stuck([beat(0), beat(1)], 0)
    assert not hang_report.all_stuck([beat(0), beat(1, phase="save", allowed=1800.0)], 0)
    assert not hang_report.all_stuck([beat(0), beat(1, unmoved=1.0)], 0)


def test_nobody_is_judged_while_one_is_in_a_debugger():
    frame = sys._getframe()
    assert hang_report.activity(frame)["state"] == "busy"
    frame.f_trace = lambda *unused: None
    try:
        state = hang_report.activity(frame)["state"]
    finally:
        frame.f_trace = None
    assert not hang_report.all_stuck([beat(0), beat(1, state)], 0)


def test_on_gpus_the_rank_that_left_out_a_collective_is_named_before_those_that_look_busy():
    ranks = [
        beat(0, "busy", phase="optimizer", gpu=True, collectives=collectives(5)),
        beat(1, phase="optimizer", gpu=True, collectives=collectives(4)),
        beat(2, phase="optimizer", gpu=True, collectives=collectives(5)),
    ]
    [(rank, cause)] = hang_report.causes(ranks)
    assert rank == 1 and "left out collective 5" in cause


def test_a_report_is_written_once_a_start_and_beside_those_of_earlier_starts(tmp_path):
    report = {"step": 7, "line": ""}
    assert hang_report.write(report, tmp_path, "a") and not hang_report.write(report, tmp_path, "a")
    assert hang_report.write(report, tmp_path, "b")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step_7.json", "step_7_2.json"]


def hang_here(event: threading.Event) -> None:
    event.wait(60)


def test_a_process_that_does_not_get_on_is_ended_with_its_stack(tmp_path, capfd):
    left, ended = [], threading.Event()

    def leave(code: int) -> None:
        left.append(code)
        ended.set()

    watch.at(7, "forward")
    watching = watch.Watch(0.6, tmp_path / "hang", None, "start", leave)
    watch.at(8, "forward")  # the first step may take longer
    hang_here(ended)
    watching.close()
    assert left[0] == watch.EXIT_CODE
    report = json.loads((tmp_path / "hang" / "step_8.json").read_text())
    assert any("hang_here" in location for location in report["ranks"][0]["stack"])
    assert "step 8 hangs: rank 0" in capfd.readouterr().err
    assert "hang_here" in (tmp_path / "hang" / "rank_0.txt").read_text()


def test_a_process_ends_although_its_files_cannot_be_written(tmp_path, capfd, monkeypatch):
    left, ended = [], threading.Event()
    monkeypatch.setattr(watch, "_FILES", 0.2)
    monkeypatch.setattr(hang_report, "write", lambda *unused: ended.wait(60))
    monkeypatch.setattr(watch.Watch, "_write_stacks", lambda *unused: ended.wait(60))
    watch.at(7, "forward")
    watching = watch.Watch(0.6, tmp_path, None, "start", lambda code: (left.append(code), ended.set()))
    watch.at(8, "forward")
    hang_here(ended)
    watching.close()
    assert left[0] == watch.EXIT_CODE and "step 8 hangs: rank 0" in capfd.readouterr().err


class BrokenStore:
    """Breaks at one call; a new connection works."""

    connections = 0
    kept: dict = {}

    def __init__(self):
        BrokenStore.connections += 1
        self.calls = 0

    def set(self, key, value):
        self.calls += 1
        if BrokenStore.connections == 1 and self.calls == 2:
            raise RuntimeError("connection reset")
        self.kept[key] = value

    def check(self, keys):
        return all(key in self.kept for key in keys)


def test_a_broken_connection_to_the_store_is_made_anew():
    beats = Beats(BrokenStore, 0, 1)
    beats.write({})
    assert beats.failing_seconds() > 0
    beats.write({"count": 2})
    assert beats.failing_seconds() == 0 and BrokenStore.kept["0"] == '{"count": 2}' and BrokenStore.connections == 2


def test_a_process_that_gets_on_leaves_no_trace(tmp_path):
    left = []
    watch.at(1, "data")
    watching = watch.Watch(2.0, tmp_path / "hang", None, "start", left.append)  # of which a busy machine takes a part
    for _ in range(30):
        time.sleep(0.1)
        watch.at(2, "forward")  # also counts where nothing changes
    watching.close()
    assert not left and not list(tmp_path.glob("hang/*"))


def test_a_signal_writes_the_stacks_and_the_process_goes_on(tmp_path):
    watching = watch.Watch(60, tmp_path, None, "start", print)
    os.kill(os.getpid(), signal.SIGUSR2)
    stacks = tmp_path / "rank_0.txt"
    wait_until(lambda: "test_a_signal_writes_the_stacks" in stacks.read_text(), seconds=20)
    watching.close()


def test_passes_of_the_schedule_count_as_progress_and_are_timed():
    timers = ScheduleTimers()
    watch.at(3, "forward")
    timers.measure()
    for name in ("forward-compute", "backward-compute", "forward-recv"):
        timers(name, log_level=2).start()
        timers(name).stop()
    assert watch._place == (3, "backward", 2)
    assert timers.busy_seconds() > 0
    timers("all-grads-sync", log_level=1).start(barrier=True)
    assert watch._place[1] == "reduce"
    watch.at(3, "evaluate")
    timers("forward-compute").start()
    assert watch._place == (3, "evaluate", 1)  # whose limit is longer


def test_others_see_the_file_that_a_process_reads():
    reading.note("data/a.bin")
    assert reading.of(os.getpid()) == "data/a.bin"
    reading.note(None)
    assert reading.of(os.getpid()) is None


SIGNALLED = """
import os, signal
from multiprocessing import resource_tracker
from megatron_ext.data.workers import Workers
with Workers().starting():
    pass
pid = resource_tracker._resource_tracker._pid
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
    os.kill(pid, number)
resource_tracker.register("/x", "semaphore")
resource_tracker.unregister("/x", "semaphore")
"""


def test_signals_to_all_processes_leave_the_resource_tracker_alive():
    environment = {**os.environ, "PYTHONPATH": PYTHON_PATH}
    done = subprocess.run([sys.executable, "-c", SIGNALLED], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
