"""A run hears signals and deadlines, and every rank draws the same conclusion from the votes."""

import os
import signal

import pytest

from megatron_ext.config import LifecycleConfig
from megatron_ext.training.lifecycle import Lifecycle, clear_finished, finished_file, mark_finished


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def make(clock):
    made = []

    def make(environment=None, **config):
        made.append(Lifecycle(LifecycleConfig(**config), environment or {}, clock))
        return made[-1]

    yield make
    for lifecycle in reversed(made):
        lifecycle.close()


def test_a_quiet_run_goes_on(make):
    lifecycle = make()
    assert lifecycle.stop_flag() == 0
    assert lifecycle.stop_reason(0.0) is None


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM", "SIGINT"])
def test_a_signal_is_a_wish_to_stop(make, name):
    lifecycle = make()
    os.kill(os.getpid(), getattr(signal, name))
    assert lifecycle.stop_reason(lifecycle.stop_flag()) == f"received {name}"


def test_the_first_interrupt_asks_and_a_later_second_one_insists(make, clock):
    make()
    os.kill(os.getpid(), signal.SIGINT)
    clock.now += 0.2
    os.kill(os.getpid(), signal.SIGINT)  # a launcher passing the same Ctrl-C on
    clock.now += 2
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_the_time_limit(make, clock):
    lifecycle = make(time_limit_minutes=2.0)
    clock.now += 119
    assert lifecycle.stop_flag() == 0
    clock.now += 1
    assert "time_limit_minutes" in lifecycle.stop_reason(lifecycle.stop_flag())


def test_the_end_of_a_slurm_job_with_its_margin(make, clock):
    lifecycle = make({"SLURM_JOB_END_TIME": "1600"}, slurm_margin_minutes=5.0)
    clock.now = 1299
    assert lifecycle.stop_flag() == 0
    clock.now = 1300
    assert lifecycle.stop_reason(lifecycle.stop_flag()) == "the Slurm job ends soon"


def test_the_sum_of_votes_gives_one_reason_however_many_ranks_vote(make, clock):
    limited = make(time_limit_minutes=1.0)
    clock.now += 60
    told = make()
    os.kill(os.getpid(), signal.SIGTERM)
    ranks = 100_000
    for votes in (limited.stop_flag(), ranks * limited.stop_flag()):
        assert "time_limit" in Lifecycle.stop_reason(votes)
    for votes in (told.stop_flag(), ranks * told.stop_flag(), told.stop_flag() + ranks * limited.stop_flag()):
        assert Lifecycle.stop_reason(votes) == "received SIGTERM"


def test_closing_gives_the_signals_back(make):
    before = signal.getsignal(signal.SIGTERM)
    lifecycle = make()
    assert signal.getsignal(signal.SIGTERM) != before
    lifecycle.close()
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_mark_of_a_complete_run_comes_and_goes(tmp_path):
    assert not finished_file(tmp_path).exists()
    clear_finished(tmp_path)
    mark_finished(tmp_path, 100)
    assert finished_file(tmp_path).read_text().strip().startswith("{")
    clear_finished(tmp_path)
    assert not finished_file(tmp_path).exists()
