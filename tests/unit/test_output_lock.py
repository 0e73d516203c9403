"""One run at a time in an output folder."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from megatron_ext.training.output_lock import OutputInUse, OutputLock

FAST = {"heartbeat": 0.05, "stale": 0.4}


def make(folder, said=None, **environment) -> OutputLock:
    return OutputLock(folder, environment, say=(said if said is not None else []).append, **FAST)


def leave(folder, **changes) -> None:
    """A lock as another process left it, which nobody renews."""
    lock = make(folder)
    lock.acquire()
    holder = json.loads(lock.path.read_text()) | changes
    lock.release()
    (folder / "LOCK").write_text(json.dumps(holder))


def test_a_second_run_is_refused_with_one_line_that_says_who_holds_the_folder(tmp_path):
    first = make(tmp_path, SLURM_JOB_ID="77")
    first.acquire()
    with pytest.raises(OutputInUse) as refusal:
        make(tmp_path).acquire()
    message = str(refusal.value)
    assert f"process {os.getpid()} on {os.uname().nodename}, Slurm job 77, since 20" in message
    assert "last sign of life" in message and "\n" not in message
    first.release()
    second = make(tmp_path)
    second.acquire()
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_of_many_runs_that_start_at_once_one_gets_the_lock(tmp_path):
    locks, refused = [make(tmp_path) for _ in range(8)], []

    def start(lock):
        try:
            lock.acquire()
        except OutputInUse:
            refused.append(lock)

    threads = [threading.Thread(target=start, args=(lock,)) for lock in locks]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(refused) == 7
    [lock.release() for lock in locks]


@pytest.mark.parametrize("change", ["the process is gone", "another process has its number", "it is a zombie"])
def test_the_lock_of_a_killed_process_of_this_host_is_taken_over_without_waiting(tmp_path, change):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    pid, started = child.pid, None
    if change == "another process has its number":
        pid, started = os.getppid(), "1"
    else:
        with open(f"/proc/{pid}/stat") as stat:
            started = stat.read().rpartition(")")[2].split()[19]
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    if change == "the process is gone":
        child.wait()
    leave(tmp_path, pid=pid, process_started=started)
    said = []
    lock = OutputLock(tmp_path, {}, said.append)  # the usual times: it would wait for a minute
    lock.acquire()
    lock.release()
    child.wait()
    assert said == [f"{tmp_path}/LOCK: taken over from process {pid} on {os.uname().nodename}, which has ended"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}),
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}),
        (
            {"MEGATRON_EXT_LAUNCH": "a", "TORCHELASTIC_RESTART_COUNT": "0"},
            {"MEGATRON_EXT_LAUNCH": "a", "TORCHELASTIC_RESTART_COUNT": "1"},
        ),
    ],
)
def test_a_later_start_of_the_same_job_on_another_host_does_not_wait(tmp_path, first, second):
    leave(tmp_path, place="another host", starts=make(tmp_path, **first)._own["starts"])
    said = []
    lock = OutputLock(tmp_path, second, said.append)
    lock.acquire()
    lock.release()
    assert said[0].endswith("an earlier start of this job")


def test_the_lock_of_another_launch_with_the_same_rendezvous_id_is_watched_however_often_it_was_started(tmp_path):
    first = {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "0", "MEGATRON_EXT_LAUNCH": "a at one:29500"}
    second = first | {"TORCHELASTIC_RESTART_COUNT": "1", "MEGATRON_EXT_LAUNCH": "a at two:29500"}
    leave(tmp_path, place="another host", starts=make(tmp_path, **first)._own["starts"])
    said = []
    lock = make(tmp_path, said, **second)
    lock.acquire()
    lock.release()
    assert "waiting up to" in said[0]


def test_an_old_lock_that_is_renewed_after_all_is_not_taken_over(tmp_path):
    leave(tmp_path, place="another host")
    os.utime(tmp_path / "LOCK", (1, 1))
    lock = OutputLock(tmp_path, {}, say=lambda line: os.utime(tmp_path / "LOCK"), heartbeat=0.1, stale=0.4)
    with pytest.raises(OutputInUse):
        lock.acquire()


def test_the_lock_of_another_host_is_taken_over_once_it_shows_no_sign_of_life(tmp_path):
    leave(tmp_path, place="another host", host="node7", starts=[["SLURM_JOB_ID", "7", 0]])
    said = []
    lock = make(tmp_path, said, SLURM_JOB_ID="7")  # the same start: two runs of one allocation
    lock.acquire()
    lock.release()
    assert len(said) == 2 and "waiting up to" in said[0]
    assert "node7, which gave no sign of life for" in said[1]


def test_a_lock_that_is_removed_is_made_again_and_one_that_is_taken_over_ends_the_run(tmp_path, monkeypatch):
    said, ended = [], threading.Event()
    lock = make(tmp_path, said)
    monkeypatch.setattr("megatron_ext.training.output_lock.os._exit", lambda code: (lock._ended.set(), ended.set()))
    create, failures = lock._create, iter([OSError(5, "Input/output error")])
    lock.acquire()

    def fail_once() -> bool:
        for failure in failures:
            raise failure
        return create()

    monkeypatch.setattr(lock, "_create", fail_once)
    lock.path.unlink()
    give_up = time.monotonic() + 20
    while not lock.path.exists():
        assert time.monotonic() < give_up
        time.sleep(0.01)
    lock.path.write_text(json.dumps({"host": "node9", "pid": 5, "token": "other"}))
    assert ended.wait(20)
    assert said == [f"{lock.path}: taken over by process 5 on node9, because this run was suspended; it ends"]
    lock.release()
    assert lock.path.exists(), "the lock of the other run was removed"
