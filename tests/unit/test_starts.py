"""What launchers that start a run again are told: starts.jsonl, REFUSED, signals before training, exit codes."""

import os
import signal
import subprocess
import sys

import pytest

from megatron_ext.errors import UserError
from megatron_ext.training import starts
from support.programs import ROOT, start_program, wait_until


@pytest.fixture
def automatic(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "9")


def fail(output, iteration: int, *errors: str) -> None:
    """A start at this iteration that ends with these errors."""
    starts.record_start(output, 2, iteration, automatic=starts.begin(output))
    for error in errors:
        starts.record_error(output, 1, RuntimeError(error))


def test_three_failed_starts_at_one_iteration_are_the_end(automatic, tmp_path):
    fail(tmp_path, 40, "Connection closed by peer", "the cause")
    fail(tmp_path, 40)
    assert starts.begin(tmp_path)
    fail(tmp_path, 40, "another")
    with pytest.raises(starts.GivenUp, match=r"3 starts at iteration 40 .*rank 1: RuntimeError: the cause"):
        starts.begin(tmp_path)


@pytest.mark.parametrize("iteration, ended", [(50, False), (40, True)])
def test_progress_and_a_good_end_are_another_chance(automatic, tmp_path, iteration, ended):
    fail(tmp_path, 40)
    fail(tmp_path, 40)
    if ended:
        starts.record_start(tmp_path, 2, 40, automatic=True)
        starts.record_end(tmp_path, 45, complete=False)
    fail(tmp_path, iteration)
    assert starts.begin(tmp_path)


def test_a_start_by_hand_is_another_chance(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for _ in range(4):
        fail(tmp_path, 40)
    assert not starts.begin(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert starts.begin(tmp_path)


@pytest.mark.parametrize(
    "other", [{"MEGATRON_EXT_LAUNCH": "another"}, {"MEGATRON_EXT_LAUNCH": "another", "SLURM_JOB_ID": "8"}]
)
def test_failures_and_refusals_of_another_launch_do_not_count(automatic, tmp_path, monkeypatch, other):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for _ in range(3):
        fail(tmp_path, 40)
    starts.refuse(tmp_path, "config: wrong")
    for name, value in other.items():
        monkeypatch.setenv(name, value)
    starts.check_refused(tmp_path)
    assert not starts.begin(tmp_path)


def test_a_refused_configuration_is_refused_again_until_someone_starts_it_by_hand(automatic, tmp_path, monkeypatch):
    starts.refuse(tmp_path, "config: wrong")
    with pytest.raises(UserError, match="^config: wrong$"):
        starts.check_refused(tmp_path)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    starts.check_refused(tmp_path)
    starts.begin(tmp_path)
    assert not (tmp_path / "REFUSED").exists()


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    fail(tmp_path, 3)
    with (tmp_path / "starts.jsonl").open("a") as file:
        file.write('{"time": 1, "wor')
    assert [record["iteration"] for record in starts.read(tmp_path)] == [3]


TRACKER = """
import os, signal, time
from multiprocessing import resource_tracker, shared_memory
from megatron_ext.training import stop_signals
signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals.SIGNALS)  # as the launcher does
os.kill(os.getpid(), signal.SIGUSR1)
stop_signals.remember()
stop_signals.admit()
assert stop_signals.received() == [signal.SIGUSR1]
memory = shared_memory.SharedMemory(create=True, size=8)
os.kill(resource_tracker._resource_tracker._pid, signal.SIGUSR1)
time.sleep(0.1)
stop_signals.ignore()
os.kill(os.getpid(), signal.SIGUSR1)
os.kill(os.getpid(), signal.SIGTERM)
memory.close()
memory.unlink()
"""


def test_early_signals_are_remembered_and_harm_no_helper_process():
    done = subprocess.run([sys.executable, "-c", TRACKER], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


PROGRAM = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
(folder / f"rank{os.environ['RANK']}").open("a").write("started\\n")
time.sleep(1)  # signals that arrive now must not be lost
from megatron_ext.training import stop_signals
stop_signals.remember()
if len(sys.argv) > 2:
    sys.exit(int(sys.argv[2]) if os.environ["RANK"] == "1" else 0)
while not stop_signals.received():
    time.sleep(0.01)
"""


def launch(tmp_path, *arguments: str) -> subprocess.Popen:
    """Two ranks of the program above."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "megatron_ext.training.launcher", "--standalone", "--nproc_per_node", "2"]
    command += ["--max-restarts", "2"]
    return start_program([*command, program, tmp_path, *arguments], stderr=subprocess.PIPE, text=True)


def test_the_launcher_passes_on_signals_that_come_before_ranks_can_handle_them(tmp_path):
    os.environ["PYTHONPATH"] = str(ROOT)
    launcher = launch(tmp_path)
    wait_until(lambda: all((tmp_path / f"rank{rank}").exists() for rank in range(2)), launcher, 120)
    launcher.send_signal(signal.SIGTERM)
    errors = launcher.communicate(timeout=120)[1]
    assert launcher.returncode == 0 and "Traceback" not in errors


def test_the_launcher_ends_with_the_code_of_the_rank_that_failed_and_does_not_repeat_a_refusal(tmp_path):
    os.environ["PYTHONPATH"] = str(ROOT)
    launcher = launch(tmp_path, "3")
    errors = launcher.communicate(timeout=120)[1]
    assert launcher.returncode == 3 and "Traceback" not in errors
    assert errors.strip().splitlines()[-1] == "launcher: rank 1 failed first, with exit code 3"
    assert (tmp_path / "rank1").read_text() == "started\n"
