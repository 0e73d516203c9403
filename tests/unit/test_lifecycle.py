"""A run responds to signals and deadlines, and every rank derives the same reason from the sum of the stop flags."""

import os
import signal

import pytest

from megatron_ext.run_config import LifecycleConfig
from megatron_ext.training.finished import clear_finished, finished_file, mark_finished
from megatron_ext.training.lifecycle import Lifecycle


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
    lifecycles = []

    def make(environment=None, **config):
        lifecycles.append(Lifecycle(LifecycleConfig(**config), environment or {}, clock))
        return lifecycles[-1]

    yield make
    for lifecycle in reversed(lifecycles):
        lifecycle.close()


def test_an_undisturbed_run_continues(make):
    lifecycle = make()
    assert lifecycle.stop_flag() == 0
    assert lifecycle.stop_reason(0.0) is None


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM", "SIGINT"])
def test_a_signal_stops_the_run(make, name):
    lifecycle = make()
    os.kill(os.getpid(), getattr(signal, name))
    assert lifecycle.stop_reason(lifecycle.stop_flag()) == f"received {name}"


def test_a_second_interrupt_a_second_later_is_immediate(make, clock):
    make()
    os.kill(os.getpid(), signal.SIGINT)
    clock.now += 0.2
    os.kill(os.getpid(), signal.SIGINT)  # a launcher passes on the same Ctrl-C
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


def test_the_sum_of_stop_flags_gives_one_reason_for_any_number_of_ranks(make, clock):
    limited = make(time_limit_minutes=1.0)
    clock.now += 60
    signalled = make()
    os.kill(os.getpid(), signal.SIGTERM)
    ranks = 100_000
    for stop_flags in (limited.stop_flag(), ranks * limited.stop_flag()):
        assert "time_limit" in Lifecycle.stop_reason(stop_flags)
    for stop_flags in (
        signalled.stop_flag(),
        ranks * signalled.stop_flag(),
        signalled.stop_flag() + ranks * limited.stop_flag(),
    ):
        assert Lifecycle.stop_reason(stop_flags) == "received SIGTERM"


def test_closing_restores_the_signal_handlers(make):
    before = signal.getsignal(signal.SIGTERM)
    lifecycle = make()
    assert signal.getsignal(signal.SIGTERM) != before
    lifecycle.close()
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_mark_of_a_complete_run_is_set_and_removed(tmp_path):
    assert not finished_file(tmp_path).exists()
    clear_finished(tmp_path)
    mark_finished(tmp_path, 100)
    assert finished_file(tmp_path).read_text().strip().startswith("{")
    clear_finished(tmp_path)
    assert not finished_file(tmp_path).exists()
