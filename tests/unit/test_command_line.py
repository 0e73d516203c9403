"""Progress of a whole that has several parts."""

import io
import time

import pytest

from megatron_ext import command_line
from megatron_ext.command_line import Whole
from megatron_ext.errors import UserError


@pytest.fixture
def clock(monkeypatch):
    """A function that sets the time, seconds."""
    return lambda seconds: monkeypatch.setattr(time, "monotonic", lambda: seconds)


@pytest.fixture
def second_part(monkeypatch, clock) -> Whole:
    """A process that is the second of two parts, from 20 % to 60 %, of a whole."""
    monkeypatch.setenv("PROGRESS_OF_WHOLE", "20,40")
    whole = Whole()
    monkeypatch.setattr(command_line, "whole", lambda: whole)
    return whole


def test_the_time_left_is_that_at_the_speed_of_this_process(second_part, clock):
    clock(1000)
    assert second_part.state(0.25) == "whole 30 %"  # resumed at a quarter
    clock(1060)
    assert second_part.state(0.5) == "whole 40 %, 6:00 left"
    assert second_part.state(1.0) == "whole 60 %, 1:20 left"


def test_a_process_divides_its_share(second_part):
    with second_part.part(0.5, 1.0):
        assert second_part.state(0.0).startswith("whole 40 %")
        with second_part.part(0.0, 0.5):
            assert second_part.state(1.0).startswith("whole 50 %")
    assert second_part.state(1.0).startswith("whole 60 %")


def test_without_a_whole_nothing_is_said_until_a_process_is_one(monkeypatch, clock):
    monkeypatch.delenv("PROGRESS_OF_WHOLE", raising=False)
    whole = Whole()
    assert whole.state(0.5) == ""
    clock(100)
    with whole.work():
        assert whole.state(0.005) == "whole 0 %"  # too early to tell the time
        clock(130)
        assert whole.state(0.5) == "whole 50 %, 0:30 left"
    assert whole.state(0.5) == ""


def test_a_malformed_whole_is_named(monkeypatch):
    monkeypatch.setenv("PROGRESS_OF_WHOLE", "20")
    with pytest.raises(UserError, match="PROGRESS_OF_WHOLE=20: expected DONE,SHARE"):
        Whole()


def test_bars_end_with_the_state_of_the_whole_and_keep_their_width(second_part, clock):
    clock(1000)
    with second_part.work():
        clock(1060)
        bar = command_line._Bar(total=4, ncols=80, file=io.StringIO())
        bar.update(1)
        assert str(bar).endswith("| whole 30 %, 7:00 left") and len(str(bar)) <= 80
        bar.close()
